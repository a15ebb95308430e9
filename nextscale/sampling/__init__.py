"""Sampling: from logits to tokens to an image, one scale at a time. `sampler.py` has the loop."""
