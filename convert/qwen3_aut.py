"""The same as `omnicodec convert qwen3-aut`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["convert", "qwen3-aut"], prog="python -m convert.qwen3_aut")
