"""The same as `omnicodec evaluate`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["evaluate"], prog="python eval.py")
