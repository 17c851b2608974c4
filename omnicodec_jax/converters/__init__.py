"""PyTorch's side of the fence: checkpoints in and out."""
