"""Frozen networks that are run, never trained: their configs stand beside them."""
