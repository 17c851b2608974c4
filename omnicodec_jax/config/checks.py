"""Checks that every config makes of its fields."""

from omnicodec_jax.errors import ConfigError


def require(condition: bool, owner: object, field: str, expected: str) -> None:
    """Raises ConfigError that names the owner's field, its value and what would be right, unless `condition` holds."""
    if not condition:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} = {value!r}: must be {expected}")


def require_positive(owner: object, *fields: str) -> None:
    """Raises ConfigError for the first of the fields that is not a number above 0; infinity is none."""
    for field in fields:
        require(0 < getattr(owner, field) < float("inf"), owner, field, "positive")
