"""`python -m omnicodec_jax …`: the same as `omnicodec …`."""

from omnicodec_jax.cli import main

if __name__ == "__main__":
    main()
