"""The same as `omnicodec convert semantic-features`."""

from omnicodec_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", "semantic-features"], prog="python -m convert.semantic_features")
