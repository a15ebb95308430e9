"""Measures generators: image quality (features, metrics, reports), latency and peak memory."""
