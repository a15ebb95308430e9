"""DMoE-VAR (arXiv 2510.08629): from a trained model to dynamic experts."""
