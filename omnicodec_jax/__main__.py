"""The program `omnicodec`, which is `python -m omnicodec_jax`, too."""

from collections.abc import Sequence

from omnicodec_jax import signals


def main(given: Sequence[str] = (), prog: str = "omnicodec") -> None:
    """Runs the command that sys.argv names, and exits with its exit code; see `cli.main`."""
    signals.end_at_once()
    from omnicodec_jax import cli  # takes half a second

    cli.main(given, prog)


if __name__ == "__main__":
    main()
