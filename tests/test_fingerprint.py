"""Fingerprints that files hold must not change from version to version."""

import hashlib

import torch

from nextscale.common.fingerprint import compute_fingerprint


def test_settings_first_then_names_and_float32_bytes_in_order():
    tensors = {
        "b": torch.arange(6.0).view(2, 3).T,
        "a": torch.tensor([1.5], dtype=torch.bfloat16),
        "c": torch.tensor(2),
    }
    digest = hashlib.sha256(b"settings")
    for name in "abc":
        digest.update(name.encode() + tensors[name].float().contiguous().numpy().tobytes())
    assert compute_fingerprint(tensors, "settings") == digest.hexdigest()
    assert compute_fingerprint({}) == hashlib.sha256().hexdigest()
    assert compute_fingerprint({"x": torch.zeros(0)}) == hashlib.sha256(b"x").hexdigest()


def test_names_values_and_settings_count():
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    others = [
        compute_fingerprint({"a": torch.zeros(2), "b": torch.ones(2)}),
        compute_fingerprint({"a": torch.ones(2), "c": torch.zeros(2)}),
        compute_fingerprint(tensors, "x"),
    ]
    assert compute_fingerprint(tensors) not in others
    assert compute_fingerprint(dict(reversed(tensors.items()))) == compute_fingerprint(tensors)
