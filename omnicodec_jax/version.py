"""The version of the package, and how others are installed, on its own so that every room can import it."""

__version__ = "0.1.0"
UPGRADE = "upgrade it (in a checkout: git pull && pip install -e . Elsewhere: pip install the wheel of a later version)"
"""The advice where a later version is needed."""


def with_extra(name: str) -> str:
    """Says how the package is installed with one of its extras. It is on no index that pip knows."""
    return f"in the checkout, pip install -e '.[{name}]', or pip install 'WHEEL[{name}]' with the file of the wheel"
