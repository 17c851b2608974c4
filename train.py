"""The same as `omnicodec train`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["train"], prog="python train.py")
