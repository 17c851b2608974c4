"""The paper's ablation "w/o semantic branch" (Table 2): acoustic codebooks alone, at the same bit rate.

    omnicodec train --config ablations/without_semantic_branch --workdir runs/without_semantic_branch \\
        --run.wavlm models/wavlm --data.prepared data/prepared

One more acoustic codebook takes the place of the semantic one. The losses of the semantic branch are off, and so is
whatever leaves one of the two branches out of a clip.
"""

import dataclasses

from omnicodec_jax.config import Config
from omnicodec_jax.recipes import paper_12hz


def ablate(config: Config) -> Config:
    codec, acoustic, optimizer = config.codec, config.codec.acoustic, config.optimizer
    more = dataclasses.replace(acoustic, num_quantizers=acoustic.num_quantizers + 1)
    left = tuple(name for name in optimizer.weight_decay_modules if not name.startswith("semantic"))
    frozen = tuple(part for part in config.train.freeze if part != "semantic")
    return dataclasses.replace(
        config,
        codec=dataclasses.replace(codec, semantic=None, acoustic=more, wavlm_dim=None),
        loss=dataclasses.replace(config.loss, semantic=0.0, wavlm_distillation=0.0),
        optimizer=dataclasses.replace(optimizer, weight_decay_modules=left),
        train=dataclasses.replace(config.train, freeze=frozen, semantic_dropout=0.0, acoustic_dropout=0.0),
    )


config = ablate(paper_12hz.config)
