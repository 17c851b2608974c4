"""`omnicodec plan`: the command that says what training and tokenizing need on chips that are not here."""

from typing import Literal

from omnicodec_jax.cli.arguments import WithConfig
from omnicodec_jax.config import Config, PerplexityConfig, Precision
from omnicodec_jax.errors import UsageError

OF_CODEC = {
    "run.mesh.data": "Number of groups of chips that hold the same state. Default: as many as there are chips for.",
    "run.mesh.fsdp": "Number of chips that share the state.",
    "run.mesh.tensor": "Number of chips that share the channels of the transformers.",
    "train.remat": "Compute activations again for the backward pass: less memory, more arithmetic.",
    "optimizer.accumulation": "Parts that a batch is split into, one after the other: less memory.",
}
OF_LANGUAGE_MODEL = {
    "batch_size": "Windows in a step, over all chips.",
    "window_frames": "Frames of a window.",
    "num_codebooks": "Number of codebooks that are predicted, the first ones.",
    "layout": "What the model knows when it predicts a code.",
    "remat": "Compute activations again for the backward pass: less memory, more arithmetic.",
    "mesh.data": "Number of groups of chips that hold the same state. Default: as many as there are chips for.",
    "mesh.fsdp": "Number of chips that share the state.",
    "mesh.tensor": "Number of chips that share the channels of the transformer.",
}


def plan(
    *,
    config: str,
    topology: str,
    what: Literal["training", "tokenizing"] = "training",
    clips_per_chip: int = 6,
    rows: int | None = None,
    block: int | None = None,
    precision: Precision = "float32",
    encoder_precision: Precision = "float32",
    by_part: bool = False,
    settings: Config | PerplexityConfig,
) -> None:
    """Compile a program for TPUs or GPUs on a machine that has none, and say what it needs.

    Args:
        config: Recipe, such as released_12hz or language_model, or a file of your own.
        topology: Chips to compile for. TPUs: v5e:4x4, v5p:2x2x2, …, or several slices, 2xv5e:16x16; GPUs: a100:8, or
            hosts x GPUs, h100:4x8.
        what: The training step, or the programs that turn audio into tokens. Each chip tokenizes clips of its own.
        clips_per_chip: Training: clips of a batch for each chip. A language model has --batch-size.
        rows: Tokenizing: clips that a chip works on at once. Default: as many as `omnicodec tokenize` has.
        block: Tokenizing: frames of a clip in a step. Default: as many as `omnicodec tokenize` has.
        precision: Tokenizing: what the codec computes in.
        encoder_precision: Tokenizing: what Qwen3-Omni's audio encoder computes in.
        by_part: Print also what each part of the networks, and each operation, moves and computes.
        settings: All that the config says.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    from omnicodec_jax.planning import programs, step_plan, tokenization

    if what == "tokenizing":
        if not isinstance(settings, Config):
            raise UsageError(f"--what tokenizing: --config {config} is a language model; name a codec's")
        asked = settings.codec, topology, rows, block, precision, encoder_precision
        plans = tokenization.plan_tokenization(*asked)
        print(step_plan.table(plans))
    elif isinstance(settings, Config):
        plans = {"training": programs.plan_training(settings, topology, clips_per_chip)}
        print(plans["training"])
    else:
        plans = {"training": programs.plan_language_model(settings, topology)}
        print(plans["training"])
    if by_part:
        for name, found in plans.items():
            print(f"\n{name}\n\n{found.breakdown}")


PLAN = WithConfig(plan, {Config: OF_CODEC, PerplexityConfig: OF_LANGUAGE_MODEL})
