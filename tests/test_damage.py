"""Damaged files: every one is named in one line, and none gives another result in silence."""

import pytest
import torch

from nextscale.checkpoints.official_files import read_tensors
from nextscale.common.errors import UserError


def flip_byte(path, position):
    """Invert one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_a_flipped_byte_of_a_pth_file_names_the_member(tmp_path):
    path = tmp_path / "x.pth"
    tensor = torch.arange(1000, dtype=torch.float32)
    torch.save({"a": tensor}, path)
    flip_byte(path, path.read_bytes().index(tensor.numpy().tobytes()) + 2000)
    with pytest.raises(UserError, match=r"x.pth is damaged: '.*data/0' in the archive.*CRC-32"):
        read_tensors(path, "")


def test_a_pth_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_tensors(tmp_path / "x.pth", "")["a"].tolist() == [0, 1, 2]
