"""The same as `omnicodec convert qwen3-aut`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", "qwen3-aut"], prog="python -m convert.qwen3_aut")
