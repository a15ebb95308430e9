"""DMoE-VAR (arXiv 2510.08629): a trained model becomes one whose compute can be turned down."""
