"""OmniCodec (arXiv 2603.20638) in JAX: a universal neural audio codec at 12.5 and 6.25 Hz."""

__version__ = "0.1.0"
