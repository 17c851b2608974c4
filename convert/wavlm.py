"""The same as `omnicodec convert wavlm`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["convert", "wavlm"], prog="python -m convert.wavlm")
