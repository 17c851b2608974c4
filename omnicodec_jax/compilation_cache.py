"""Compiled programs are kept between runs."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

from omnicodec_jax import machine


def use() -> None:
    """Keeps compiled programs between runs, in $OMNICODEC_CACHE or the user's cache directory."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = os.environ.get("OMNICODEC_CACHE") or str(Path(cache) / "omnicodec_jax")
    jax.config.update("jax_compilation_cache_dir", folder(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    remove_what_is_cut()


def folder(directory: str) -> str:
    """Returns the folder of a cache directory, or of one in a bucket, for the CPU and the cores that this process has.

    XLA compiles a program for the instructions of the CPU, and divides it among the cores. JAX does not tell such
    programs apart: two cores would take up what was divided for one, and in a home directory that machines share, one
    would find the other's instructions.
    """
    return f"{directory.rstrip('/')}/{machine.cores()}_cores_{machine.kind_of_cpu()}"


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
