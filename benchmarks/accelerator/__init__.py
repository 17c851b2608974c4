"""What a machine with GPUs or TPUs makes of this package, in one table: python -m benchmarks.accelerator

settings.py   what is measured, at full size or small; the codec with random weights
sameness.py   whether its numbers are those of a CPU, of numpy, of the reference and of another process
speed.py      training step, first codebooks, tokenization, and the slowest operations
pytorch.py    the codec converted to PyTorch, and Mimi there
__main__.py   the command: every row in a process of its own
"""
