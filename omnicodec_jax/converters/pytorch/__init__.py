"""OmniCodec in PyTorch: the code that `omnicodec convert to-torch` puts beside the weights.

The files run by themselves wherever transformers loads them (`trust_remote_code=True`), so they import
torch and transformers, and nothing of this package.
"""
