"""Trains a language model on the tokens of a directory, before it is measured or continues tokens."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.distributed import multihost, sharding
from omnicodec_jax.language_model.training import Trainer, train
from omnicodec_jax.language_model.windows import TokenCorpus
from omnicodec_jax.training.checkpoint import Checkpoints
from omnicodec_jax.training.packing import Tree


class Learnt(NamedTuple):
    """A trained language model. `perplexity.evaluate` measures it, and `continuation.draw` continues tokens with it."""

    trainer: Trainer
    params: Tree
    corpus: TokenCorpus
    """The windows that the model was trained on, and those that were held out."""
    mesh: Mesh
    """The devices that hold the parameters."""


def learn(tokens: Path, config: PerplexityConfig, workdir: Path | None = None) -> Learnt:
    """Trains a language model on some clips of a directory of token shards, and holds out the others.

    Args:
        tokens: Directory that `omnicodec tokenize` has written.
        config: The model and its training.
        workdir: Directory of checkpoints, from which an interrupted training is resumed. None: nothing is saved.

    Returns:
        The model after its last step.

    Raises:
        DataError: For tokens that cannot be used.
        ConfigError: For a mesh that does not fit the devices.
        CheckpointError: For a `workdir` that holds a run of another config or on other tokens.
        TrainingError: For a training that diverges.
        Interrupted: With the number of the signal, if there is a `workdir` and the training was asked to stop. The last
            step is saved.
    """
    corpus, mesh = TokenCorpus.open(tokens, config), sharding.make_mesh(config.mesh)
    trainer = Trainer(config, corpus.layout)
    if workdir is None:
        params = train(trainer, corpus, mesh)
    else:
        kept = Checkpoints(workdir, config, corpus.fingerprint, {"sources": corpus.sources})
        with kept as checkpoints, multihost.Interruption() as interruption:
            params = train(trainer, corpus, mesh, checkpoints, interruption)
    return Learnt(trainer, params, corpus, mesh)
