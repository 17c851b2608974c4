"""Compiled programs are kept between runs."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any


def use() -> None:
    """Keeps compiled programs between runs, in $OMNICODEC_CACHE or the user's cache directory."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("OMNICODEC_CACHE") or str(Path(cache) / "omnicodec_jax")
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    remove_what_is_cut()


def remove_what_is_cut() -> None:
    """Makes JAX remove a program that it could not write to its end.

    JAX itself leaves it, can never read it, and does not write it again, so that after a full disk every start would
    compile that program anew.
    """
    from jax._src import lru_cache

    theirs: Any = lru_cache.LRUCache.put
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def put(self: Any, key: str, value: bytes) -> None:
        try:
            theirs(self, key, value)
        except Exception:
            with contextlib.suppress(Exception):
                (self.path / f"{key}{lru_cache._CACHE_SUFFIX}").unlink()
            raise

    lru_cache.LRUCache.put = put
