"""Configs of whole experiments, by name."""
