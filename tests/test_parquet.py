"""Data sets in Parquet files: their labels, their images and what says how the classes are called."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig, ReadConfig
from nextscale.data.datasets import load_images, open_dataset
from nextscale.data.sources import open_source
from tests.test_sources import LENIENT, encode_png, write_files


def write_table(path, features=None, **columns):
    import pyarrow as arrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table(columns)
    if features is not None:
        content = features if isinstance(features, bytes) else json.dumps({"info": {"features": features}}).encode()
        table = table.replace_schema_metadata({"huggingface": content})
    parquet.write_table(table, path, row_group_size=2)


def images(count, first=0):
    return [{"bytes": encode_png(first + i), "path": f"{i}.png"} for i in range(count)]


def class_label(*names):
    return {"names": list(names), "_type": "ClassLabel"}


def read_rows(path, config=None):
    """Class of each row in order, by the grey of its picture, and the source."""
    source = open_source(str(path), 8, config)
    classes = {}
    for i, label in enumerate(source.labels):
        picture = source.read(i)[1]
        pixel = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture).getpixel((0, 0))[0]
        classes[pixel] = source.class_names[label]
    return classes, source


def test_imagenet_s_layout(tmp_path):
    """The label -1 of the test rows shifts no class; these rows are left out, and that is said."""
    features = {"image": {"_type": "Image"}, "label": class_label("tench", "goldfish", "shark")}
    for split, labels in (("train", [2, 0, 1, 0]), ("validation", [0, 1, 2]), ("test", [-1, -1, -1])):
        first = {"train": 0, "validation": 50, "test": 100}[split]
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        write_table(path, features, image=images(len(labels), first), label=labels)
    classes, source = read_rows(tmp_path)
    assert source.class_names == ("tench", "goldfish", "shark")
    assert classes == {0: "shark", 1: "tench", 2: "goldfish", 3: "tench", 50: "tench", 51: "goldfish", 52: "shark"}
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 4, "held_out": 3}
    (line,) = source.unused.format_lines()
    assert line.startswith("not used: 3 rows without a label (test 3), such as ")
    order = source.order(np_rows(source), make_rng())
    assert sorted(order.tolist()) == list(range(7))
    train, held_out, _ = open_dataset(str(tmp_path), 8, DataConfig(), 0)
    assert (len(train), len(held_out)) == (4, 3)


def np_rows(source):
    import torch

    return torch.arange(len(source.labels))


def make_rng():
    import torch

    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("named", [True, False])
def test_rows_without_a_label_shift_no_class(named, tmp_path):
    features = {"label": class_label("a", "b", "c")} if named else None
    write_table(tmp_path / "x.parquet", features, image=images(5), label=[1, -1, 0, 2, None])
    names = ["a", "b", "c"] if named else ["0", "1", "2"]
    assert read_rows(tmp_path / "x.parquet")[0] == {0: names[1], 2: names[0], 3: names[2]}


def test_attributes_of_minus_one_and_one_are_classes(tmp_path):
    write_table(tmp_path / "x.parquet", image=images(3), label=[1, -1, 1])
    assert read_rows(tmp_path / "x.parquet")[0] == {0: "1", 1: "-1", 2: "1"}


def test_files_whose_classes_have_another_order_are_matched_by_name(tmp_path):
    write_table(tmp_path / "a.parquet", {"label": class_label("cat", "dog")}, image=images(2), label=[0, 1])
    write_table(tmp_path / "b.parquet", {"label": class_label("dog", "cat")}, image=images(2, 10), label=[0, 1])
    classes, source = read_rows(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert classes == {0: "cat", 1: "dog", 10: "dog", 11: "cat"}
    assert "classes are matched by name" in source.unused.format_lines()[0]
    write_table(tmp_path / "c.parquet", image=images(2, 20), label=["dog", "cat"])
    assert read_rows(tmp_path)[0] == {**classes, 20: "dog", 21: "cat"}


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (None, [0, 1], "holds names, that of .*b.parquet holds numbers without names: their classes cannot be matched"),
        (None, ["cat", "cow"], "b.parquet has the label 'cow'; the classes are cat, dog"),
        ({"label": class_label("cat", "dog")}, [0, 2], "has the label 2 in column 'label', but names of 2 classes"),
        ({"label": class_label("cat", "cat")}, [0, 1], "names several classes alike"),
        (None, [0.5, 1.0], "whole number or a text in every row; a row has 0.5"),
    ],
)
def test_files_whose_classes_cannot_be_matched_are_refused(features, labels, message, tmp_path):
    write_table(tmp_path / "a.parquet", {"label": class_label("cat", "dog")}, image=images(2), label=[0, 1])
    write_table(tmp_path / "b.parquet", features, image=images(2, 10), label=labels)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), 8)


def test_mixed_numbers_and_texts_are_refused(tmp_path):
    write_table(tmp_path / "a.parquet", image=images(2), label=[0, 1])
    write_table(tmp_path / "b.parquet", image=images(2), label=["0", "1"])
    with pytest.raises(UserError, match="holds numbers without names, that of .* holds texts"):
        open_source(str(tmp_path), 8)


def test_names_are_those_of_the_label_s_own_column(tmp_path):
    features = {"shape": class_label("round", "square"), "label": class_label("cat", "dog")}
    write_table(tmp_path / "x.parquet", features, image=images(2), shape=[0, 0], label=[1, 0])
    assert read_rows(tmp_path / "x.parquet")[0] == {0: "dog", 1: "cat"}


@pytest.mark.parametrize(
    "metadata", [b"{", b"[]", b"null", b'{"info": null}', b'{"info": {"features": []}}', b"\xff",
                 b'{"info": 3}',
                 b'{"info": {"features": {"label": "ClassLabel"}}}',
                 b'{"info": {"features": {"label": {"names": 3}}}}'],
)  # fmt: skip
def test_odd_metadata_is_as_none(metadata, tmp_path):
    write_table(tmp_path / "x.parquet", metadata, image=images(3), label=["dog", "cat", "dog"])
    assert read_rows(tmp_path / "x.parquet")[0] == {0: "dog", 1: "cat", 2: "dog"}


def test_cifar100_s_labels_are_chosen(tmp_path):
    features = {"fine_label": class_label("apple", "bear"), "coarse_label": class_label("fish", "fruit", "mammal")}
    write_table(tmp_path / "x.parquet", features, img=images(2), fine_label=[0, 1], coarse_label=[1, 2])
    with pytest.raises(UserError, match="no column 'label'; .*--images.label-column: fine_label, coarse_label"):
        open_source(str(tmp_path / "x.parquet"), 8)
    fine = ReadConfig(label_column="fine_label")
    assert read_rows(tmp_path / "x.parquet", fine)[0] == {0: "apple", 1: "bear"}
    coarse = ReadConfig(label_column="coarse_label")
    with pytest.raises(UserError, match="has no images of fish"):
        open_source(str(tmp_path / "x.parquet"), 8, coarse)
    write_table(tmp_path / "y.parquet", features, img=images(3), fine_label=[0, 1, 1], coarse_label=[1, 2, 0])
    assert read_rows(tmp_path / "y.parquet", coarse)[0] == {0: "fruit", 1: "mammal", 2: "fish"}


def test_food101_s_folder(tmp_path):
    """Names only in the metadata, text splits in the files' names, a README beside them."""
    features = {"image": {"_type": "Image"}, "label": class_label("apple_pie", "ramen")}
    write_table(tmp_path / "data" / "train-00000-of-00002.parquet", features, image=images(2), label=[1, 0])
    write_table(tmp_path / "data" / "train-00001-of-00002.parquet", features, image=images(2, 10), label=[0, 1])
    write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", features, image=images(2, 20), label=[0, 1])
    write_files(tmp_path, "README.md", ".cache/x.parquet", "data/._train-00000-of-00002.parquet", content=b"no table")
    classes, source = read_rows(tmp_path)
    assert classes == {0: "ramen", 1: "apple_pie", 10: "apple_pie", 11: "ramen", 20: "apple_pie", 21: "ramen"}
    assert any("README.md" in line for line in source.unused.format_lines())


@pytest.mark.parametrize("names", [(), ("pink primrose", "canna", "lily")])
def test_flowers_whose_labels_start_at_one(names, tmp_path):
    features = {"label": class_label(*names)} if names else None
    write_table(tmp_path / "x.parquet", features, image=images(3), label=[1, 3, 2])
    expected = names or ("1", "2", "3")
    classes, source = read_rows(tmp_path / "x.parquet")
    assert classes == {0: expected[0], 1: expected[2], 2: expected[1]}
    assert source.class_names == expected
    assert len(source.unused.remarks) == bool(names)


def test_celeba_s_attributes_are_listed_and_chosen(tmp_path):
    attributes = {name: [True, False, True] for name in ("Smiling", "Male", "Young")}
    write_table(tmp_path / "x.parquet", image=images(3), celeb_id=[1, 2, 3], score=[0.1, 0.2, 0.3], **attributes)
    with pytest.raises(UserError, match="--images.label-column: celeb_id, Smiling, Male, Young$"):
        open_source(str(tmp_path / "x.parquet"), 8)
    classes, _ = read_rows(tmp_path / "x.parquet", ReadConfig(label_column="Smiling"))
    assert classes == {0: "True", 1: "False", 2: "True"}
    with pytest.raises(UserError, match="has no column 'Bald'"):
        open_source(str(tmp_path / "x.parquet"), 8, ReadConfig(label_column="Bald"))


def test_columns_of_images_may_differ_between_files(tmp_path):
    write_table(tmp_path / "a.parquet", image=images(2), label=["x", "y"])
    write_table(tmp_path / "b.parquet", img=images(2, 10), label=["x", "y"])
    assert read_rows(tmp_path)[0] == {0: "x", 1: "y", 10: "x", 11: "y"}
    write_table(tmp_path / "a.parquet", first=images(2), second=images(2, 40), label=["x", "y"])
    with pytest.raises(UserError, match=r"a.parquet has several columns with images \(first, second\)"):
        open_source(str(tmp_path / "a.parquet"), 8)
    chosen, other = ReadConfig(image_column="second"), ReadConfig(image_column="first")
    fingerprints = [open_source(str(tmp_path / "a.parquet"), 8, config).fingerprint() for config in (chosen, other)]
    assert fingerprints[0] != fingerprints[1]
    assert read_rows(tmp_path / "a.parquet", chosen)[0] == {40: "x", 41: "y"}
    write_table(tmp_path / "a.parquet", image=[[1, 2], [3]], label=["x", "y"])
    with pytest.raises(UserError, match="column 'image' holds list<.*, not image files"):
        open_source(str(tmp_path / "a.parquet"), 8)


def test_rows_with_a_path_and_no_bytes_are_files(tmp_path, monkeypatch):
    paths = ["pictures/0.png", "pictures\\1.png"]
    write_files(tmp_path / "set", *(path.replace("\\", "/") for path in paths))
    import pyarrow as arrow

    struct = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    rows = [{"bytes": None, "path": path} for path in paths]
    for cells in (rows, arrow.array(rows, struct), paths):
        write_table(tmp_path / "set" / "x.parquet", image=cells, label=["x", "y"])
        monkeypatch.chdir(tmp_path)
        source = open_source("set/x.parquet", 8)
        before = source.fingerprint()
        assert [source.read(i)[1].name for i in range(2)] == ["0.png", "1.png"]
        assert len(load_images("set/x.parquet", 8)) == 2
        write_files(tmp_path / "set", "pictures/1.png", content=(tmp_path / "set/pictures/1.png").read_bytes() + b" ")
        assert source.fingerprint() != before
    write_table(tmp_path / "set" / "x.parquet", image=[{"bytes": None, "path": "/absent/2.png"}], label=["x"])
    with pytest.raises(UserError, match="holds no bytes, only the path /absent/2.png, and there is no such file"):
        load_images("set/x.parquet", 8)
    with pytest.raises(UserError, match="both tables of images .* and folders with images"):
        open_source("set", 8)


def test_a_file_without_the_labels_is_left_out(tmp_path):
    write_table(tmp_path / "train.parquet", image=images(2), label=["x", "y"])
    write_table(tmp_path / "test.parquet", image=images(2, 10))
    classes, source = read_rows(tmp_path)
    assert (classes, source.splits) == ({0: "x", 1: "y"}, {})
    assert "rows without a label (test 2)" in source.unused.format_lines()[0]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    files=st.lists(
        st.tuples(st.permutations(["cat", "dog", "cow"]), st.lists(st.integers(-1, 2), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    )
)
def test_random_orders_of_names_are_matched_by_name(files, tmp_path_factory):
    """Whatever order each file numbers its classes in, a row has the class that its own file names."""
    root = tmp_path_factory.mktemp("tables")
    expected = {}
    for number, (names, labels) in enumerate(files):
        first = 10 * number
        write_table(
            root / f"{number}.parquet", {"label": class_label(*names)}, image=images(len(labels), first), label=labels
        )
        expected |= {first + i: names[label] for i, label in enumerate(labels) if label >= 0}
    if expected:
        assert read_rows(root, LENIENT)[0] == expected
    else:
        with pytest.raises(UserError, match="column 'label' must hold"):
            open_source(str(root), 8, LENIENT)
