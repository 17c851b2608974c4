"""The same as `omnicodec convert from-torch`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", "from-torch"], prog="python -m convert.from_torch")
