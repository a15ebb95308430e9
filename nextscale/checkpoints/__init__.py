"""Checkpoints: the native folder, and the official VAR files in both directions."""
