"""The same as `omnicodec convert semantic-features`."""

from omnicodec_jax import cli

if __name__ == "__main__":
    cli.main(["convert", "semantic-features"], prog="python -m convert.semantic_features")
