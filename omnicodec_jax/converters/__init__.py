"""Converters: checkpoints from and to PyTorch, and semantic features that PyTorch computes."""
