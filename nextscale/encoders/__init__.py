"""Frozen encoders whose features a generator is guided by."""
