"""The same as `omnicodec train`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["train"], prog="python train.py")
