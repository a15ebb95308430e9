"""Fast twins for NVIDIA GPUs."""
