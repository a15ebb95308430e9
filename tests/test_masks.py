"""Masks of an edit in every form, and edits of arrays."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.data.arrays import read_mask
from tests.conftest import randomised, tiny_config
from tests.test_arrays import PIXELS, SIZE


@pytest.fixture(scope="module")
def pipeline():
    return randomised(tiny_config())


@pytest.mark.parametrize("kind", ["bool", "uint8", "levels", "int64", "float64", "float16", "torch", "PIL", "path"])
def test_masks_of_every_kind(kind, tmp_path):
    keep = np.zeros(SIZE, bool)
    keep[:, :4] = True
    grey = Image.fromarray(keep.astype(np.uint8) * 255)
    grey.save(tmp_path / "mask.png")
    forms = {
        "bool": keep, "uint8": keep.astype(np.uint8), "levels": keep.astype(np.uint8) * 255,
        "int64": keep.astype(np.int64) * 255, "float64": keep.astype(float), "float16": keep.astype(np.float16),
        "torch": torch.from_numpy(keep), "PIL": grey, "path": tmp_path / "mask.png",
    }  # fmt: skip
    mask = forms[kind]
    assert torch.equal(read_mask(mask, Image.fromarray(PIXELS[0]), SIZE), torch.from_numpy(keep).float())
    if isinstance(mask, np.ndarray):
        for shaped in (mask[None], mask[..., None], mask[None, None], mask[None, ..., None]):
            assert torch.equal(read_mask(shaped, Image.fromarray(PIXELS[0]), SIZE), torch.from_numpy(keep).float())


def test_masks_of_the_image_s_size_follow_its_crop(tmp_path):
    keep = np.zeros((16, 48), np.uint8)
    keep[:, 24:] = 255
    for mask in (Image.fromarray(keep), keep, keep > 0, keep / 255):
        fitted = read_mask(mask, Image.new("RGB", (48, 16)), SIZE)
        assert (fitted > 0.5).tolist() == [[False] * 4 + [True] * 4] * 8


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((4, 4)), r"a mask tensor must be \(8, 8\); got \(4, 4\)"),
        (np.ones((3, 8, 8)), r"one channel, \(H, W\); got the shape \(3, 8, 8\)"),
        (np.ones(64), "one channel"),
        (np.full(SIZE, 2.0), "must lie in 0 to 1; got 2 to 2"),
        (np.full(SIZE, -1.0), "must lie in 0 to 1"),
        (np.full(SIZE, np.nan), "must lie in 0 to 1"),
        (np.full(SIZE, 7), "must be 0 and 1, or 0 and 255; got 7 to 7"),
        (np.ones(SIZE, complex), "truth values or numbers"),
        ([[1, 0]], "must be a path, a PIL picture or an array; got list"),
        (None, "got NoneType"),
    ],
)
def test_masks_that_are_none(mask, message, pipeline):
    with pytest.raises(UserError, match=message):
        pipeline.edit(PIXELS[0], mask)


def test_edit_takes_one_image_in_any_form(pipeline):
    mask = np.arange(64).reshape(SIZE) % 8 < 4
    expected = pipeline.edit(PIXELS[0], torch.from_numpy(mask).float()).tokens
    for image in ([PIXELS[0]], Image.fromarray(PIXELS[0])):
        assert torch.equal(pipeline.edit(image, mask.astype(np.uint8) * 255).tokens, expected)
    with pytest.raises(UserError, match="edit takes one image; got 2"):
        pipeline.edit(PIXELS, np.ones(SIZE))
