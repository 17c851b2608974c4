"""The same as `omnicodec convert mimi`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", "mimi"], prog="python -m convert.mimi")
