"""OmniCodec (arXiv 2603.20638) in JAX: a universal neural audio codec at 12.5 and 6.25 Hz.

The names below are those that most programs need. Each is imported when it is first used, so that importing the
package is fast and touches no device; they live where `FACE` says.
"""

import importlib
from typing import TYPE_CHECKING, Any

from omnicodec_jax.version import __version__

if TYPE_CHECKING:
    from omnicodec_jax.corpus import TokenSource, read_tokens
    from omnicodec_jax.data.pipeline import Batches, Samples
    from omnicodec_jax.streaming import StreamingDecoder, StreamingEncoder
    from omnicodec_jax.token_file import TokenFile
    from omnicodec_jax.tokenizer import OmniCodecTokenizer

FACE = {
    "OmniCodecTokenizer": "tokenizer",
    "StreamingEncoder": "streaming",
    "StreamingDecoder": "streaming",
    "TokenFile": "token_file",
    "TokenSource": "corpus",
    "read_tokens": "corpus",
    "Samples": "data.pipeline",
    "Batches": "data.pipeline",
}
"""Module of each public name of the package."""

__all__ = [
    "Batches",
    "OmniCodecTokenizer",
    "Samples",
    "StreamingDecoder",
    "StreamingEncoder",
    "TokenFile",
    "TokenSource",
    "__version__",
    "read_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{FACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FACE})
