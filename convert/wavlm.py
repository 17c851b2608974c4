"""The same as `omnicodec convert wavlm`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", "wavlm"], prog="python -m convert.wavlm")
