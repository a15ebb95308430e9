"""Kernels in C that the machine's compiler builds at their first use, and the functions that call them."""
