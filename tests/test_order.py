"""Figures depend on the images that are measured, and neither on their order, their form, nor stale features."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.sampling import SampleConfig
from nextscale.data.parts import choose_part
from nextscale.data.sources import open_source
from nextscale.encoders.classifier import Classifier
from nextscale.evaluation.images import StoredImages, open_images, pair_rows
from nextscale.evaluation.run import evaluate, make_statistics
from nextscale.evaluation.sizes import choose_size
from tests.test_inputs import touch, write_images

CLASSES = tuple("abcde")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A classifier with random weights, and reference images."""
    folder = tmp_path_factory.mktemp("order")
    torch.manual_seed(0)
    Classifier(ClassifierConfig(8, (8,), 4), CLASSES).save(folder / "classifier")
    write_images(folder / "real", 60, CLASSES, seed=9, side=8)
    return folder


def measure(places, source, out, count=0, **options):
    config = EvaluationConfig(count=count, split=20, references=30, shard=16, **{"batch": 7, **options})
    report = evaluate(str(source), out, [str(places / "classifier")], [str(places / "real")], config, World())
    return report["measures"]["classifier"]


def write_sorted(folder, count=50):
    """Images whose brightness is that of their class; (pixels, labels) in the order of the files."""
    rng = np.random.default_rng(0)
    labels = np.sort(np.arange(count) % len(CLASSES))
    pixels = (rng.integers(0, 56, (count, 8, 8, 3)) + 50 * labels[:, None, None, None]).astype(np.uint8)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / CLASSES[label] / f"{i:03d}.png")
    return pixels, labels


def test_equal_images_give_equal_figures_in_any_form_and_order(places, tmp_path):
    """By class, under random names, as .npz and as a table: also the score's splits and a part of the references."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pixels, labels = write_sorted(tmp_path / "sorted")
    order = np.random.default_rng(1).permutation(len(pixels))
    for place, i in enumerate(order):
        target = tmp_path / "shuffled" / CLASSES[labels[i]]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(target / f"{place:03d}.png")
    np.savez(tmp_path / "images.npz", pixels[order], labels[order])
    files = sorted((tmp_path / "sorted").rglob("*.png"), key=lambda f: f.name)
    table = {"image": [{"bytes": files[i].read_bytes()} for i in order], "label": [CLASSES[labels[i]] for i in order]}
    parquet.write_table(arrow.table(table), tmp_path / "images.parquet")
    expected = measure(places, tmp_path / "sorted", tmp_path / "sorted.json")
    assert expected["classifier_score_deviation"] > 0, "there are several splits"
    for number, name in enumerate(("shuffled", "images.npz", "images.parquet")):
        found = measure(places, tmp_path / name, tmp_path / f"{number}.json", batch=11)
        for metric in ("classifier_fd", "classifier_score", "classifier_score_deviation", "classifier_precision",
                       "classifier_recall", "classifier_read_as_asked"):  # fmt: skip
            assert found[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-7), (name, metric)


def test_a_part_is_drawn_from_all_classes(places, tmp_path):
    """The first 25 by name are the first two of five classes, whose distance is far from the set's."""
    write_sorted(tmp_path / "sorted", 100)
    images = StoredImages(str(tmp_path / "sorted"), count=25)
    assert torch.bincount(images.labels()).tolist() == [5] * 5
    config = EvaluationConfig()
    make_statistics(str(tmp_path / "sorted"), str(places / "classifier"), tmp_path / "all.npz", config, World())

    def distance(count):
        out, networks = tmp_path / f"{count}.json", [str(places / "classifier")]
        report = evaluate(
            str(tmp_path / "sorted"), out, networks, [str(tmp_path / "all.npz")], EvaluationConfig(count), World()
        )
        return report["measures"]["classifier"]["classifier_fd"]

    (tmp_path / "first").mkdir()
    for name in "ab":
        (tmp_path / "first" / name).symlink_to(tmp_path / "sorted" / name)
    first = measure_against(places, tmp_path / "first", tmp_path / "all.npz", tmp_path / "first.json")
    assert distance(25) < first / 3


def measure_against(places, source, reference, out):
    report = evaluate(str(source), out, [str(places / "classifier")], [str(reference)], EvaluationConfig(), World())
    return report["measures"]["classifier"]["classifier_fd"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 3))
@example([0, 1, 3, 3, 3, 3, 3, 4], 3, 0)  # three images of class 3, whose share is 1.875
def test_every_class_has_its_share_of_a_part(labels, count, seed):
    """Against the plain shares; larger parts contain smaller ones."""
    rows = choose_part(len(labels), count, torch.tensor(labels), seed)
    count = min(count, len(labels))
    assert len(rows) == len({*rows.tolist()}) == count
    assert rows.tolist() == sorted(rows.tolist())
    for label in {*labels}:
        share = labels.count(label) * count / len(labels)
        bound = 0.5 + len({*labels}) / 2 * labels.count(label) / len(labels)
        assert abs(sum(labels[row] == label for row in rows) - share) <= bound, (label, share)
    if count > 1:
        smaller = choose_part(len(labels), count - 1, torch.tensor(labels), seed)
        assert {*smaller.tolist()} < {*rows.tolist()}


def test_images_that_were_replaced_are_measured_again_and_it_is_said(places, tmp_path, capsys):
    """Features were kept by the folder's name, and the old distance was reported."""
    folder, out = write_images(tmp_path / "pictures", 20, CLASSES, side=8), tmp_path / "r.json"
    before = measure(places, folder, out)
    capsys.readouterr()
    assert measure(places, folder, out) == before
    assert "note" not in capsys.readouterr().out
    for file in folder.rglob("*.bmp"):  # equal names and sizes
        Image.new("RGB", (8, 8), "white").save(file)
    touch(folder)
    after = measure(places, folder, out)
    assert after["classifier_fd"] > 2 * before["classifier_fd"]
    text = capsys.readouterr().out
    assert f"are made again: the files of {folder} have other modification times" in text
    assert measure(places, folder, tmp_path / "new.json") == after
    write_images(places / "real", 60, CLASSES, seed=8, side=8)
    touch(places / "real")
    assert measure(places, folder, out)["classifier_fd"] != after["classifier_fd"]
    assert "reference-0 are made again" in capsys.readouterr().out


def test_statistics_of_a_data_set_that_changed(places, tmp_path, capsys):
    folder = write_images(tmp_path / "pictures", 20, CLASSES, side=8)
    arguments = str(folder), str(places / "classifier"), tmp_path / "s.npz", EvaluationConfig(), World()
    before = make_statistics(*arguments)
    write_images(folder, 25, CLASSES, seed=1, side=8)
    after = make_statistics(*arguments)
    assert (before.images, after.images) == (20, 25)
    assert "have changed: 20 files" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as file:
        assert int(file["images"]) == 25
        assert str(file["size"]) == "8 x 8"


def test_npz_under_the_same_name_and_other_settings_are_measured_again(places, tmp_path, capsys):
    rng, out = np.random.default_rng(0), tmp_path / "r.json"
    for _ in range(2):
        np.savez(tmp_path / "x.npz", rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
        figures = measure(places, tmp_path / "x.npz", out)
    assert figures == measure(places, tmp_path / "x.npz", tmp_path / "new.json")
    assert "the content of" in capsys.readouterr().out
    part = measure(places, tmp_path / "x.npz", out, count=12)
    assert part == measure(places, tmp_path / "x.npz", tmp_path / "part.json", count=12)
    assert "images.rows was all, now" in capsys.readouterr().out


def test_images_that_are_missing_from_the_folder_are_written_again(places, tmp_path):
    folder = write_images(tmp_path / "pictures", 10, CLASSES, side=8)
    for _ in range(2):
        evaluate(
            str(folder), tmp_path / "r.json", [], [], EvaluationConfig(shard=4), World(), images_out=tmp_path / "out"
        )
        files = sorted((tmp_path / "out").iterdir())
        assert len(files) == 10
        files[3].unlink()


def test_mixed_sizes_are_resized_to_what_most_have(places, tmp_path, capsys):
    sizes = [(12, 8)] * 5 + [(8, 8)] * 2 + [(20, 30)]
    for i, size in enumerate(sizes):
        (tmp_path / "most").mkdir(exist_ok=True)
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / "most" / f"{i}.png")
    size, note = choose_size(open_source(str(tmp_path / "most"), 8))
    assert size == (8, 12)
    assert "have 3 sizes; they are resized and centre-cropped to 12 x 8, on which the figures depend" in note
    for i, size in enumerate([(9, 20), (11, 10), (30, 12), (40, 50), (8, 8), (14, 18)]):
        (tmp_path / "none").mkdir(exist_ok=True)
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / "none" / f"{i}.png")
    turned = Image.effect_noise((60, 9), 50).convert("RGB")
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "none" / "6.jpg", exif=turned.getexif())
    size, _ = choose_size(open_source(str(tmp_path / "none"), 8))
    assert size == (10, 10), "the median of the short sides 8 9 9 10 12 14 40"
    report = evaluate(
        str(tmp_path / "none"), tmp_path / "r.json", [str(places / "classifier")], [], EvaluationConfig(), World()
    )
    assert report["protocol"]["size"] == [10, 10]
    assert "resized and centre-cropped to 10 x 10" in report["protocol"]["sizes"]
    assert "note: the 7 images of" in capsys.readouterr().out


def test_pairs_are_of_equal_numbers(tmp_path):
    """A part of two sets is the same part of both; a model's images are compared with the first ones."""
    pixels, _ = write_sorted(tmp_path / "sorted")
    np.savez(tmp_path / "flat.npz", pixels)
    sides = [open_images(str(tmp_path / name), 10, 0, SampleConfig(), 1) for name in ("sorted", "flat.npz")]
    pair_rows(*sides)
    a, b = (side.fetch(0, 10) for side in sides)
    assert torch.equal(a, b)
    assert torch.bincount(sides[0].labels()).tolist() == [2] * 5
    np.savez(tmp_path / "small.npz", pixels[:, :4, :4])
    with pytest.raises(UserError, match=r"sorted has images of 8 x 8, .*small.npz of 4 x 4: give --size"):
        pair_rows(sides[0], open_images(str(tmp_path / "small.npz"), 10, 0, SampleConfig(), 1))
    assert json.dumps(sides[1].identity())
