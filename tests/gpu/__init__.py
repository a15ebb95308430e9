"""Tests of a GPU (CUDA, or Apple's MPS): `make test-gpu`. They have never run on one so far."""
