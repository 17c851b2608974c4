"""The same as `omnicodec convert whisper`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", "whisper"], prog="python -m convert.whisper")
