"""`omnicodec convert …`: the commands that convert checkpoints from and to PyTorch, and store semantic features."""

from omnicodec_jax.converters import from_torch, mimi, qwen3_aut, semantic_features, to_torch, wavlm, whisper

COMMANDS = {
    "from-torch": from_torch.main,
    "to-torch": to_torch.main,
    "mimi": mimi.main,
    "wavlm": wavlm.main,
    "qwen3-aut": qwen3_aut.main,
    "whisper": whisper.main,
    "semantic-features": semantic_features.main,
}
"""The functions of the commands by name."""
