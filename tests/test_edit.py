"""Editing: what the mask keeps stays, what it does not is sampled."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.pyramid import Pyramid
from nextscale.sampling.editing import select_kept_cells
from tests.conftest import randomised, tiny_config
from tests.test_guidance_schedule import NOTHING, build


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scales", ["1,2,3,4", "4", "2x1,4x4"])
def test_everything_kept_is_the_reconstruction(image, scales, smooth):
    pipeline = randomised(tiny_config(scales))
    edited = pipeline.edit(image, torch.ones(8, 8), 3, smooth=smooth)
    restored = pipeline.reconstruct([image])
    assert torch.equal(edited.tokens, restored.tokens)
    assert torch.equal(edited.tensor, restored.tensor)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("label", [None, 2])
def test_nothing_kept_is_a_plain_sample(tiny, image, label, smooth):
    edited = tiny.edit(image, torch.zeros(8, 8), label, seed=5, smooth=smooth)
    sample = tiny.sample([label], seed=5, smooth=smooth)
    assert torch.equal(edited.tokens, sample.tokens)
    assert torch.equal(edited.tensor, sample.tensor)


@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("family", ["dense", "stmoe", "mvar", "dynamic"])
@pytest.mark.parametrize("smooth", [False, True])
def test_guidance_that_ends_edits_as_guidance_that_changes_nothing(family, smooth, backend, image):
    pipeline = build(family).optimize(backend)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    ended = pipeline.edit(image, mask, 2, cfg=9.0, cfg_scales=3, seed=4, smooth=smooth)
    whole = pipeline.edit(image, mask, 2, cfg=(0.0, 3.0, 6.0, NOTHING), seed=4, smooth=smooth)
    assert torch.equal(ended.tokens, whole.tokens)
    assert torch.equal(ended.tensor, whole.tensor)
    keep = select_kept_cells(mask, pipeline.config.pyramid)
    assert torch.equal(ended.tokens[0, keep], pipeline.encode([image])[0, keep])
    assert not torch.equal(ended.tokens, pipeline.edit(image, mask, 2, cfg=0.0, seed=4, smooth=smooth).tokens)


def test_kept_cells_carry_the_encoding_at_every_scale(tiny, image):
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    tokens, edited = tiny.encode([image]), tiny.edit(image, mask, 1, seed=1)
    keep = select_kept_cells(mask, tiny.config.pyramid)
    assert torch.equal(edited.tokens[0, keep], tokens[0, keep])
    assert not torch.equal(edited.tokens[0, ~keep], tokens[0, ~keep])
    assert keep[0], "the coarsest map stays"
    assert keep[-16:].view(4, 4).tolist() == [[True, True, False, False]] * 4
    others = tiny.edit(image, mask, 1, seed=2)
    assert torch.equal(others.tokens[0, keep], tokens[0, keep])
    assert not torch.equal(others.tokens, edited.tokens)


def test_cells_against_bilinear_interpolation_written_out():
    mask = torch.rand(12, 8, generator=torch.Generator().manual_seed(0))
    pyramid = Pyramid.parse("1,3x2,6x4")
    expected = []
    for h, w in pyramid.sides:
        for i in range(h):
            for j in range(w):
                y, x = max((i + 0.5) * 12 / h - 0.5, 0), max((j + 0.5) * 8 / w - 0.5, 0)
                y0, x0 = int(y), int(x)
                y1, x1, v, u = min(y0 + 1, 11), min(x0 + 1, 7), y - int(y), x - int(x)
                top = mask[y0, x0] * (1 - u) + mask[y0, x1] * u
                bottom = mask[y1, x0] * (1 - u) + mask[y1, x1] * u
                expected.append(bool(top * (1 - v) + bottom * v > 0.5) or h * w <= 3)
    assert select_kept_cells(mask, pyramid).tolist() == expected


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    return status, capsys.readouterr()


def test_command_line(tiny_folder, image, tmp_path, capsys):
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = ["--mask", tmp_path / "mask.png", "--out", tmp_path / "edited.png"]
    assert run(capsys, "edit", tiny_folder, image, *out, "--label", "2")[0] == 0
    assert Image.open(tmp_path / "edited.png").size == (8, 8)
    # a mask of another size is resized, and said so
    Image.fromarray(mask).resize((50, 30)).save(tmp_path / "mask.png")
    status, printed = run(capsys, "edit", tiny_folder, image, *out)
    assert (status, "was resized to it" in printed.out) == (0, True)
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    assert "keeps everything" in run(capsys, "edit", tiny_folder, image, *out)[1].out
    Image.new("L", (8, 8), 0).save(tmp_path / "mask.png")
    assert "keeps nothing" in run(capsys, "edit", tiny_folder, image, *out)[1].out
    assert "there is no image" in run(capsys, "edit", tiny_folder, tmp_path / "no.png", *out)[1].err
    assert "--label takes one class" in run(capsys, "edit", tiny_folder, image, *out, "--label", "1,2")[1].err
    (tmp_path / "mask.png").write_bytes(b"no picture")
    assert "cannot read image" in run(capsys, "edit", tiny_folder, image, *out)[1].err


def test_mask_follows_the_image_s_resizing(tiny_folder, tmp_path, capsys):
    """On a wide photo the mask is cropped with the photo: what it marks stays where it is."""
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    mask = np.zeros((16, 48), dtype=np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    from nextscale.data.images import load_mask

    fitted, resized = load_mask(tmp_path / "mask.png", tmp_path / "wide.png", (8, 8))
    assert not resized
    assert (fitted > 0.5).tolist() == [[False] * 4 + [True] * 4] * 8


def test_mask_tensor_of_the_wrong_shape(tiny, image):
    with pytest.raises(UserError, match=r"a mask tensor must be \(8, 8\); got \(4, 4\)"):
        tiny.edit(image, torch.ones(4, 4))
