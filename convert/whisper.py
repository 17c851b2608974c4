"""The same as `omnicodec convert whisper`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["convert", "whisper"], prog="python -m convert.whisper")
