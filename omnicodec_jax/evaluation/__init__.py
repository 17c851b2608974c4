"""Codecs compared: metrics, peers, reports, language models over tokens."""
