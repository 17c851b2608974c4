"""The parameters of the codec that learn: all but those of the parts that `train.freeze` names."""

from omnicodec_jax.config import TrainConfig
from omnicodec_jax.models.backbone import PARTS
from omnicodec_jax.training.packing import Tree


def fixed_modules(config: TrainConfig) -> tuple[str, ...]:
    """Returns the sorted names of the codec's top-level modules that do not learn."""
    return tuple(sorted({name for part in config.freeze for name in PARTS[part]}))


def learning(config: TrainConfig, params: Tree) -> Tree:
    """Picks the codec's parameters that learn, packed or not. Only these have gradients and optimizer state."""
    fixed = fixed_modules(config)
    return {name: tree for name, tree in params.items() if name not in fixed}
