"""The same as `omnicodec convert to-torch`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["convert", "to-torch"], prog="python -m convert.to_torch")
