"""Metrics of images and codebooks, as functions of tensors."""
