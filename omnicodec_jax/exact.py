"""Programs that give the same numbers wherever and whenever they run, as far as compilers allow.

Tokens have to be the same on every device, and the smallest difference can flip a code. But float32 is not float32
everywhere: TPUs compute float32 products in bfloat16, and recent GPUs in TF32, unless they are told otherwise. And on a
GPU, the order of a sum may change from run to run, and with it the rounding.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")

DETERMINISTIC = {"xla_gpu_deterministic_ops": True}
"""Compiler options for GPUs: sums always in the same order, and no measuring which algorithm is the fastest now."""


def full_float32(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function whose float32 products are computed in full float32 on every kind of device.

    It holds for all that the function traces, also for layers that ask for nothing, and reaches programs that are
    exported. What computes in bfloat16 goes on to do so.

    Examples:
        >>> import jax.numpy as jnp
        >>> program = jax.jit(full_float32(jnp.dot)).lower(jnp.ones(2), jnp.ones(2))
        >>> "HIGHEST" in program.as_text()
        True
    """

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced


def jit(function: Callable[..., Any], platform: str | None = None, **options: Any) -> Any:
    """Does what `jax.jit` does, for programs whose results have to be the same every time, on every kind of device.

    Args:
        function: The function. Its float32 products are computed in full.
        platform: Platform of the devices that the function will run on; None: that of JAX's default device.
        options: Options of `jax.jit`.
    """
    on_gpu = (platform or jax.default_backend()) in ("gpu", "cuda")
    return jax.jit(full_float32(function), compiler_options=DETERMINISTIC if on_gpu else None, **options)
