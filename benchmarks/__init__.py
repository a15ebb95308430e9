"""Benchmarks of speed: ratios within one run on one machine."""
