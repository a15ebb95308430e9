"""DMoE-VAR (arXiv 2510.08629): a trained dense model becomes one whose compute is turned down per scale, after training."""
