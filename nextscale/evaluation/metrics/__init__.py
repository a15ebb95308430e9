"""Measures of images and of codebooks."""
