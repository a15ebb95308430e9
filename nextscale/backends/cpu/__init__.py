"""Fast twins for CPUs: oneDNN products, packed weights, compiled kernels."""
