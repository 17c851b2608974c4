"""Tokens of whole corpora: written by `omnicodec tokenize`, read for language models."""

from omnicodec_jax.corpus.shards import Clip, contract, read_tokens
from omnicodec_jax.corpus.source import TokenSource, delayed, flat

__all__ = ["Clip", "TokenSource", "contract", "delayed", "flat", "read_tokens"]
