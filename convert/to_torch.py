"""The same as `omnicodec convert to-torch`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", "to-torch"], prog="python -m convert.to_torch")
