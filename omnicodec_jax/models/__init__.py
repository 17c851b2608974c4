"""The codecs that are trained and shipped: OmniCodec and Mimi, and the layers that they are made of."""
