"""Codecs compared side by side: reconstructions, metrics, other codecs, reports and listening tests."""
