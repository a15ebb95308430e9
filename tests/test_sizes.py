"""Images that are not square: everything that squares can do, at a model's own height and width."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.checkpoints.adapt import adapt
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.common.sizes import parse_size
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.tokenizer_training import derive_pyramid
from nextscale.data.datasets import load_images
from nextscale.data.images import crop_randomly
from nextscale.encoders.classifier import Classifier
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.discriminator import PatchDiscriminator
from tests.conftest import randomised, tiny_config

SCALES = "1,1x2,2x3,3x6"
"""Of images of 6 x 12 pixels."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of photographs in three shapes, and a classifier for them."""
    folder = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(0)
    for i in range(14):
        path = folder / "photos" / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = [(20, 30, 3), (30, 20, 3), (13, 14, 3)][i % 3]
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    Classifier(ClassifierConfig(8, (8, 16), 8), ("cat", "dog")).save(folder / "classifier")
    return folder


def run(*arguments):
    status = main([str(a) for a in arguments])
    assert status == 0, arguments


def crop_square_as_before(image, size, draws):
    """VAR's random crop of squares, as it was before other shapes were possible."""
    scale = round(1.125 * size) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = int(draws[0] * (width - size + 1)), int(draws[1] * (height - size + 1))
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("shape", [(40, 60), (61, 37), (32, 32), (9, 50)])
def test_random_crops_of_squares_are_what_they_were(shape):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))
    for draws in ((0.0, 0.0), (0.3, 0.9), (0.999, 0.5)):
        ours, before = crop_randomly(image, (16, 16), draws), crop_square_as_before(image, 16, draws)
        assert np.array_equal(np.asarray(ours), np.asarray(before))


def test_random_crops_of_other_shapes_stay_inside_the_image():
    """A gradient from left to right: a crop of the model's shape shows a part of it as wide as the enlargement says."""
    gradient = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    image = Image.fromarray(np.ascontiguousarray(gradient))
    left, right = (np.asarray(crop_randomly(image, (16, 32), (draw, draw))) for draw in (0.0, 0.999))
    assert left.shape == right.shape == (16, 32, 3)
    assert left[8, 0, 0] < 5
    assert right[8, -1, 0] > 194
    assert (right[:, -1, 0].astype(int) - right[:, 0, 0]).mean() == pytest.approx(200 * 31 / 36, abs=3)


def test_data_sets_are_resized_and_cropped_to_height_and_width(tmp_path):
    """Left half black, right half white: the centre of the crop is where they meet, at the height asked for."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 30:] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    for size in ((6, 12), (12, 6), (8, 8)):
        (image,) = load_images(str(tmp_path), size).images_B3HW
        assert image.shape == (3, *size)
        middle = size[1] // 2
        assert image[:, :, : middle - 1].max() < 20
        assert image[:, :, middle + 1 :].min() > 235
    digits = load_images("digits", (12, 8), limit=20)
    assert digits.images_B3HW.shape == (20, 3, 12, 8)


def test_sizes_as_typed():
    assert [parse_size("--size", text) for text in ("0", "32", "24x32", "24X32")] == [0, 32, (24, 32), (24, 32)]
    for text in ("", "x", "-1", "24x", "24x0", "24x32x3", "1.5", "big"):
        with pytest.raises(UserError, match="--size takes pixels"):
            parse_size("--size", text)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_discriminators_say_how_large_images_must_be(layers):
    discriminator, least = PatchDiscriminator(8, layers), 3 * 2**layers
    PatchDiscriminator.check_size((least, least + 9), layers)
    assert discriminator(torch.rand(1, 3, least, least + 9)).numel() > 0
    with pytest.raises(
        UserError, match=f"needs images of {least} pixels a side or more, and these are 40 x {least - 1}"
    ):
        PatchDiscriminator.check_size((40, least - 1), layers)
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):
        discriminator(torch.rand(1, 3, 40, least - 1))


def test_pyramids_of_tokenizers():
    assert str(derive_pyramid(0, 2, "1,2,3x4,6x8")) == "1,2,3x4,6x8"
    with pytest.raises(UserError, match="must be 16 for images of 32 pixels"):
        derive_pyramid(32, 2, "1,2,3x4,6x8")
    with pytest.raises(UserError, match="must be 16 for images of 32 pixels"):
        derive_pyramid(0, 2, "1,2,5")


def test_a_wide_model_from_training_to_measuring(photos, tmp_path, capsys):
    """Every command that reads a data set, with a model of 6 x 12 pixels."""
    data = photos / "photos"
    small = ["--train.steps", 2, "--train.batch-size", 4, "--train.save-every", 2, "--device", "cpu"]
    tokenizer = [
        "--tokenizer.vocab-size", 16, "--tokenizer.code-width", 4, "--tokenizer.base-channels", 8,
        "--tokenizer.channel-multipliers", 1, 1, "--tokenizer.res-blocks", 1, "--tokenizer.norm-groups", 4,
    ]  # fmt: skip
    (tmp_path / "none.yaml").write_text("{}")
    run("tokenizer", "train", tmp_path / "none.yaml", "--data", data, "--out", tmp_path / "tokenizer",
        "--scales", SCALES, *tokenizer, *small)  # fmt: skip
    run("tokenize", data, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "cache", "--images.random-crop",
        "--device", "cpu")  # fmt: skip
    run("train", tmp_path / "none.yaml", "--data", tmp_path / "cache", "--tokenizer", tmp_path / "tokenizer",
        "--out", tmp_path / "model", "--transformer.depth", 1, "--transformer.width", 16, "--transformer.heads", 2,
        *small)  # fmt: skip
    pipeline = Pipeline.from_pretrained(tmp_path / "model")
    assert pipeline.config.image_size == (6, 12)
    assert (pipeline.config.pyramid, pipeline.config.class_names) == (Pyramid.parse(SCALES), ("cat", "dog"))
    picture = next((data / "cat").iterdir())
    run("reconstruct", tmp_path / "model", data, "--out", tmp_path / "restored.png")
    Image.new("L", Image.open(picture).size, 255).save(tmp_path / "mask.png")
    run("sample", tmp_path / "model", "--labels", "cat,dog", "--out", tmp_path / "grid.png")
    run("edit", tmp_path / "model", picture, "--mask", tmp_path / "mask.png", "--out", tmp_path / "edited.png")
    assert Image.open(tmp_path / "edited.png").size == (12, 6)
    assert torch.equal(pipeline.edit(picture, tmp_path / "mask.png").tokens, pipeline.encode([picture]))
    run("statistics", data, "--features", photos / "classifier", "--size", "6x12", "--out", tmp_path / "ref.npz",
        "--device", "cpu")  # fmt: skip
    run("evaluate", tmp_path / "model", "--features", photos / "classifier", "--num", 12, "--reference", data,
        "--out", tmp_path / "report.json", "--device", "cpu")  # fmt: skip
    run("evaluate", data, "--features", photos / "classifier", "--size", "6x12", "--reference", tmp_path / "ref.npz",
        "--out", tmp_path / "real.json", "--device", "cpu")  # fmt: skip
    real = json.loads((tmp_path / "real.json").read_text())
    assert real["protocol"]["size"] == [6, 12]
    assert real["measures"]["classifier"]["classifier_fd"] == pytest.approx(0, abs=1e-4)
    run("evaluate", tmp_path / "model", "--reconstruct", data, "--features", photos / "classifier",
        "--reference", tmp_path / "ref.npz", "--out", tmp_path / "restored.json", "--device", "cpu")  # fmt: skip


def test_an_adapted_model_reads_data_sets(photos, tmp_path):
    """The issue's case: `adapt --scales` to a wide pyramid, then train on images of a folder."""
    randomised(tiny_config()).save_pretrained(tmp_path / "square")
    checkpoint = adapt(read_checkpoint(tmp_path / "square"), None, Pyramid.parse(SCALES))
    write_checkpoint(tmp_path / "wide", checkpoint)
    (tmp_path / "none.yaml").write_text("{}")
    run("adapt", tmp_path / "wide", "--classes", "cat,dog", "--out", tmp_path / "two")
    run("train", tmp_path / "none.yaml", "--start", tmp_path / "two", "--data", photos / "photos",
        "--out", tmp_path / "run", "--train.steps", 2, "--train.batch-size", 4, "--device", "cpu")  # fmt: skip
    assert Pipeline.from_pretrained(tmp_path / "run").sample(["cat"]).tensor.shape == (1, 3, 6, 12)
