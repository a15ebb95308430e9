"""Data sets: image sources, decoding, examples for training, and the token cache."""
