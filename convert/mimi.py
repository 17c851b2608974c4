"""The same as `omnicodec convert mimi`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["convert", "mimi"], prog="python -m convert.mimi")
