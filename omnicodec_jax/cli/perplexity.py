"""`omnicodec perplexity`: the command that measures how well a language model predicts tokens."""

import contextlib
import json
import logging
from pathlib import Path

from omnicodec_jax.cli.arguments import WithConfig
from omnicodec_jax.config import PerplexityConfig
from omnicodec_jax.files import check_place, rewriting

LOG = logging.getLogger(__name__)

MOST_USED = {
    "layout": "What the model knows when it predicts a code. Perplexities of different layouts cannot be compared.",
    "num_codebooks": "Number of codebooks that are predicted, the first ones.",
    "held_out": "Share of the clips that the model does not train on and is measured on.",
    "window_frames": "Clips are cut into windows of so many frames.",
    "batch_size": "Windows in a step, over all devices.",
    "optimizer.total_steps": "Steps of training.",
    "optimizer.learning_rate": "The highest learning rate, which is reached after optimizer.warmup-steps.",
    "mesh.fsdp": "Number of devices that share the state.",
    "seed": "Seed of the weights and of the order of the windows.",
}


def perplexity(
    *, tokens: Path, config: str, out: Path | None = None, workdir: Path | None = None, settings: PerplexityConfig
) -> int:
    """Train a language model on token shards and print the perplexity of held-out clips.

    Args:
        tokens: Directory that `omnicodec tokenize` has written.
        config: Recipe, such as language_model, or a file of your own.
        out: JSON file to write the result to, with the hash of the codec's model.
        workdir: Directory of checkpoints, from which the same command goes on after an interruption. Default: no
            checkpoints are written.
        settings: All that the config says.
    """
    from omnicodec_jax.corpus import shards
    from omnicodec_jax.data.claim import claim
    from omnicodec_jax.distributed import multihost
    from omnicodec_jax.language_model.perplexity import NOTE, measure

    multihost.initialize()
    if out is not None and multihost.is_main():
        check_place(out)
    with claim(workdir) if workdir is not None and multihost.is_main() else contextlib.nullcontext():
        try:
            result = measure(tokens, settings, workdir)
        except multihost.Interrupted as interrupted:
            LOG.info("interrupted: the last step is saved, and the same command goes on from there")
            (signal,) = interrupted.args
            return 128 + signal
    if not multihost.is_main():
        return 0
    if out is not None:
        about = {"note": NOTE, "codec": shards.contract(tokens)["model"]}
        with rewriting(out) as temporary:
            temporary.write_text(json.dumps({**about, **result.to_dict()}, indent=2) + "\n")
    print(result)
    return 0


PERPLEXITY = WithConfig(perplexity, {PerplexityConfig: MOST_USED})
