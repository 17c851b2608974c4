"""`omnicodec plan`: the command that says what a training step needs on chips that are not there."""

from omnicodec_jax.cli.arguments import WithConfig
from omnicodec_jax.config import Config, PerplexityConfig

OF_CODEC = {
    "run.mesh.data": "Groups of chips that hold the same state. Default: as many as there are chips for.",
    "run.mesh.fsdp": "Chips that share the state out among them.",
    "run.mesh.tensor": "Chips that share the transformers' channels.",
    "data.segment_samples": "Samples of a clip, at 24 kHz.",
    "train.compute_dtype": "Number format of convolutions and matrix products.",
    "train.remat": "Compute activations again for the backward pass: less memory, more arithmetic.",
    "train.discriminator_update": "Whether the codec learns against the updated discriminators or the earlier ones.",
    "optimizer.accumulation": "Parts that a batch is split into, one after the other: less memory.",
}
OF_LANGUAGE_MODEL = {
    "batch_size": "Windows in a step, over all chips.",
    "window_frames": "Frames of a window.",
    "num_codebooks": "Codebooks that are predicted.",
    "layout": "What the model knows when it predicts a code.",
    "remat": "Compute activations again for the backward pass: less memory, more arithmetic.",
    "mesh.data": "Groups of chips that hold the same state. Default: as many as there are chips for.",
    "mesh.fsdp": "Chips that share the state out among them.",
    "mesh.tensor": "Chips that share the transformer's channels.",
}


def plan(*, config: str, topology: str, clips_per_chip: int = 6, settings: Config | PerplexityConfig) -> None:
    """Compile a training step for TPUs without any, and say what it needs.

    Args:
        config: Recipe, such as released_12hz or language_model, or a file of your own.
        topology: Chips to compile for: v5e:4x4, v5p:2x2x2, …
        clips_per_chip: The batch is this times the number of chips. (The batch of a language model is batch-size.)
        settings: All that the config says.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    from omnicodec_jax.planning import programs

    if isinstance(settings, Config):
        print(programs.plan_training(settings, topology, clips_per_chip))
    else:
        print(programs.plan_language_model(settings, topology))


PLAN = WithConfig(plan, {Config: OF_CODEC, PerplexityConfig: OF_LANGUAGE_MODEL})
