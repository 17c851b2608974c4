"""The same as `omnicodec evaluate`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["evaluate"], prog="python eval.py")
