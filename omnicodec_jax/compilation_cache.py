"""Compiled programs are kept between runs."""

import os
from pathlib import Path


def use() -> None:
    """Keeps compiled programs between runs, in $OMNICODEC_CACHE or the user's cache directory."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("OMNICODEC_CACHE") or str(Path(cache) / "omnicodec_jax")
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
