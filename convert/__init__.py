"""The converters in a checkout: `python -m convert.from_torch` is `omnicodec convert from-torch`."""
