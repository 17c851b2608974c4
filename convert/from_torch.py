"""The same as `omnicodec convert from-torch`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["convert", "from-torch"], prog="python -m convert.from_torch")
