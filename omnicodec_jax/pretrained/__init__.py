"""Frozen networks, which are run and never trained, and their configs."""
