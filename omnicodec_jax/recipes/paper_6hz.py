"""OmniCodec-F at 6.25 Hz as the paper describes it: strides [12, 8, 5, 4], 1 + 31 codebooks, 2200 bit/s.

All else is as in paper_12hz.py. The segment is a multiple of the 3840-sample frame (10.24 s), so that no clip ends in
half a frame; the paper truncates to 10 s.
"""

import dataclasses

from omnicodec_jax.config import DataConfig, SEANetConfig
from omnicodec_jax.recipes import paper_12hz

config = dataclasses.replace(
    paper_12hz.config,
    codec=dataclasses.replace(paper_12hz.config.codec, seanet=SEANetConfig(ratios=(12, 8, 5, 4), n_residual_layers=1)),
    data=DataConfig(segment_samples=64 * 3840),
)
