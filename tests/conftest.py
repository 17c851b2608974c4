"""Strict arithmetic, eight fake devices and a shared compilation cache for all tests."""

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import os
import time
import uuid
from collections.abc import Iterator
from multiprocessing import forkserver

from quick_compilation import QUICKLY

# Eight devices to shard over.
FLAGS = f"--xla_force_host_platform_device_count=8 {QUICKLY}"
# Workers inherit them; given twice, programs that others have compiled would not be found.
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path  # noqa: E402

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and types of every annotated function are checked at run time.
install_import_hook(["omnicodec_jax"], "beartype.beartype")

import jax  # noqa: E402 (after the hook and the flags)
import pytest  # noqa: E402

from omnicodec_jax import compilation_cache, machine  # noqa: E402

machine.collect_garbage_less_often()

ROOT = Path(__file__).parents[1]
GIVE_BACK = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""The function of glibc that gives freed memory back to the operating system; None elsewhere."""

PAUSE = 5.0
"""Seconds between two times that freed memory is given back to the operating system."""

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", compilation_cache.folder(str(ROOT / ".jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Writes out what is not UTF-8 in captured texts, which workers could not hand on: all tests would end."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files first that say they take minutes: begun last, one of them would keep a single worker busy.

    A worker takes a file as a whole (--dist loadfile), whose fixtures its tests share.
    """

    def minutes(item: pytest.Item) -> float:
        mark = item.get_closest_marker("minutes")
        return 0 if mark is None else mark.args[0]

    items.sort(key=minutes, reverse=True)


@pytest.fixture(scope="module", autouse=True)
def programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled programs and cached results go with the module that needs them; all together they take gigabytes."""
    yield
    for value in vars(request.module).values():
        if getattr(value, "__module__", None) == request.module.__name__ and hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()
    give_back(pause=0)


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """What a test has freed goes back to the system."""
    yield
    give_back()


def compiled(event: str, duration_secs: float, **_: str | int) -> None:
    """What the compiler has freed goes back to the system before it begins again: of a training step, 0.9 GB."""
    if event.endswith("backend_compile_duration"):
        give_back()


jax.monitoring.register_event_duration_secs_listener(compiled)
given_back = time.monotonic()


def give_back(pause: float = PAUSE) -> None:
    """Gives freed memory back, unless that was done within the last seconds.

    glibc keeps it otherwise, since it lies between what is not free.
    """
    global given_back
    if GIVE_BACK is not None and time.monotonic() - given_back >= pause:
        GIVE_BACK(0)
        given_back = time.monotonic()


@pytest.fixture(scope="session")
def clips() -> list[Path]:
    """The bundled audio."""
    return sorted((ROOT / "omnicodec_jax/clips").glob("*.flac"))


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a model with the codebooks of the recipe demo and half of its layers, with random weights."""
    from tiny import variables

    from omnicodec_jax import model_directory
    from omnicodec_jax.config import SEANetConfig
    from omnicodec_jax.recipes import demo

    seanet = SEANetConfig(n_filters=2, ratios=(32, 30), n_residual_layers=1)
    transformer = dataclasses.replace(demo.config.codec.transformer, num_layers=1)
    codec = dataclasses.replace(demo.config.codec, seanet=seanet, transformer=transformer)
    directory = tmp_path_factory.mktemp("demo") / "model"
    model_directory.save(directory, codec, variables(codec))
    return directory


@pytest.fixture(scope="session")
def servers() -> Iterator[None]:
    """Servers of buckets on this machine, which this process and its children find by their environment."""
    for module in ("gcsfs", "s3fs", "moto", "gcp_storage_emulator"):
        if importlib.util.find_spec(module) is None:  # gcsfs, once imported, would not look at its variables again
            pytest.skip(f"needs {module}, of the extras dev, gcs and s3")
    import bucket_servers
    import fsspec

    from omnicodec_jax.buckets import requests

    with contextlib.ExitStack() as running, pytest.MonkeyPatch.context() as patch:
        for serve in bucket_servers.SERVERS.values():
            _, variables = running.enter_context(serve())
            for name, value in variables.items():
                patch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)  # which reads it when it is imported
        patch.setattr(requests, "SILENCE", 5.0)
        forkserver._forkserver._stop()  # it would give its children the environment of before
        yield
        forkserver._forkserver._stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(servers: None, request: pytest.FixtureRequest) -> Path:
    """An empty folder in a bucket of each kind."""
    from omnicodec_jax.buckets import as_path

    return as_path(f"{request.param}://test/{uuid.uuid4().hex}")
