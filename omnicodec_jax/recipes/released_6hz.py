"""OmniCodec at 6.25 Hz in the manner of the released code: 1 + 32 codebooks, 2268.75 bit/s, 147.1 M parameters.

The authors released no config for this rate; this is released_12hz with the paper's strides [12, 8, 5, 4]. The
segment is a multiple of the 3840-sample frame (10.24 s), so that no clip ends in half a frame.
"""

import dataclasses

from omnicodec_jax.config import DataConfig, SEANetConfig
from omnicodec_jax.recipes import released_12hz

config = dataclasses.replace(
    released_12hz.config,
    codec=dataclasses.replace(
        released_12hz.config.codec, seanet=SEANetConfig(ratios=(12, 8, 5, 4), n_residual_layers=4)
    ),
    data=DataConfig(segment_samples=64 * 3840),
)
