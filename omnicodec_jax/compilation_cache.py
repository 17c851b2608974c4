"""Compiled programs are kept between runs."""

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any

from omnicodec_jax import machine
from omnicodec_jax.buckets import BucketPath, as_path
from omnicodec_jax.errors import told
from omnicodec_jax.files import disk_error

LOG = logging.getLogger(__name__)


def use() -> None:
    """Keeps compiled programs between runs, in $OMNICODEC_CACHE or the user's cache directory.

    Where there can be none, a line says so, and all programs are compiled. Raises BucketError for a URL to read.
    """
    import jax

    try:
        place = _place()
        if isinstance(place, BucketPath):
            place.check_writable()
        else:
            place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home directory
        _tell(told(error))
        return
    jax.config.update("jax_compilation_cache_dir", folder(str(place)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    remove_what_is_cut()


def _place() -> Path:
    """Returns the directory of compiled programs, which may be one in a bucket."""
    if named := os.environ.get("OMNICODEC_CACHE"):
        return place if isinstance(place := as_path(named), BucketPath) else place.expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnicodec_jax"


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
    compile that program anew. A full disk is told once; JAX itself warns of every program, in two lines of Python.
    """
    from jax._src import lru_cache

    theirs: Any = lru_cache.LRUCache.put
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def put(self: Any, key: str, value: bytes) -> None:
        try:
            theirs(self, key, value)
        except Exception as error:
            with contextlib.suppress(Exception):
                (self.path / f"{key}{lru_cache._CACHE_SUFFIX}").unlink()
            if not isinstance(error, OSError):
                raise
            _tell(f"{self.path}: {(disk_error(error, Path(self.path)) or error).strerror}")

    lru_cache.LRUCache.put = put


@functools.cache
def _tell(trouble: str) -> None:
    LOG.warning("programs are compiled anew by every run: %s (OMNICODEC_CACHE)", trouble)
