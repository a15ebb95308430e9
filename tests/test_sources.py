"""Data sets as people have them: each layout is understood, and what is not used is said, by class and reason."""

import csv
import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig, ReadConfig
from nextscale.data.datasets import load_images, open_dataset
from nextscale.data.describe import format_classes, list_doubts
from nextscale.data.sources import open_source

LENIENT = ReadConfig(allow_empty_classes=True)


def encode_png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), (value, value // 2, 7)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = encode_png(0)


def write_files(root, *names, content=PNG):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_folder(path, config=None):
    """({path below the folder: class}, paths of each split, lines on what is not used)."""
    source = open_source(str(path), 8, config)
    names = [source.read(i)[0].removeprefix(f"{path}/") for i in range(len(source.labels))]
    classes = {name: source.class_names[label] for name, label in zip(names, source.labels, strict=True)}
    assert len(classes) == len(names)
    splits = {split: [names[row] for row in rows] for split, rows in source.splits.items()}
    return classes, splits, source.unused.format_lines()


# ---- folders


def test_the_training_folder_alone_is_the_whole_set(tmp_path):
    write_files(tmp_path, "train/cat/1.png", "train/dog/2.png")
    classes, splits, lines = read_folder(tmp_path)
    assert (classes, splits) == ({"train/cat/1.png": "cat", "train/dog/2.png": "dog"}, {})
    assert lines == [f"{tmp_path} has only the split train: all its images are one set"]


@pytest.mark.parametrize(("train", "held_out"), [("Train", "Val"), ("TRAINING", "Test"), ("train", "VALIDATION")])
def test_splits_in_any_case(train, held_out, tmp_path):
    write_files(tmp_path, *(f"{split}/{name}/1.png" for split in (train, held_out) for name in ("cat", "dog")))
    classes, splits, lines = read_folder(tmp_path)
    assert set(classes.values()) == {"cat", "dog"}
    assert splits == {
        "train": [f"{train}/cat/1.png", f"{train}/dog/1.png"],
        "held_out": [f"{held_out}/cat/1.png", f"{held_out}/dog/1.png"],
    }
    assert lines == []


def test_splits_of_images_without_classes(tmp_path):
    write_files(tmp_path, "train/1.png", "train/2.png", "val/3.png")
    classes, splits, _ = read_folder(tmp_path)
    assert set(classes.values()) == {tmp_path.name}
    assert splits["held_out"] == ["val/3.png"]


def test_a_test_folder_without_classes_is_left_out(tmp_path):
    write_files(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/3.png", "test/4.png")
    classes, splits, lines = read_folder(tmp_path)
    assert (len(classes), splits) == (2, {})
    assert "not used: 2 images of a split without classes (test 2), such as test/3.png" in lines
    write_files(tmp_path, "val/cat/5.png", "val/dog/6.png")
    classes, splits, lines = read_folder(tmp_path)
    assert splits["held_out"] == ["val/cat/5.png", "val/dog/6.png"]
    write_files(tmp_path, "test/cat/5.png", "test/dog/6.png")
    (tmp_path / "test/3.png").unlink()
    (tmp_path / "test/4.png").unlink()
    assert "not used: 2 images of further splits (test 2), such as test/cat/5.png" in read_folder(tmp_path)[2]


@pytest.mark.parametrize("wrapper", ["images", "archive/data/images"])
def test_folders_around_the_classes_are_no_class(wrapper, tmp_path):
    write_files(tmp_path, f"{wrapper}/cat/1.png", f"{wrapper}/dog/2.png", "annotations/list.txt")
    classes, _, lines = read_folder(tmp_path)
    assert list(classes.values()) == ["cat", "dog"]
    assert lines[0] == f"{tmp_path}: classes are read from its folder {wrapper}/"
    assert "not used: 1 files that are no images (annotations 1), such as annotations/list.txt" in lines


def test_folders_around_splits_are_no_class(tmp_path):
    names = [f"CIFAR-master/{split}/{name}/1.png" for split in ("train", "test") for name in ("cat", "dog")]
    write_files(tmp_path, *names)
    _, splits, _ = read_folder(tmp_path)
    assert (splits["train"], splits["held_out"]) == (names[:2], names[2:])


def test_one_class_with_a_folder_in_it_keeps_its_name(tmp_path):
    write_files(tmp_path, "cat/images/1.png", "cat/images/2.png")
    assert set(read_folder(tmp_path)[0].values()) == {"cat"}
    write_files(tmp_path, "dog/a/1.png", "dog/2.png")
    classes, _, lines = read_folder(tmp_path)
    assert sorted(classes.values()) == ["cat", "cat", "dog", "dog"]
    assert lines == [f"{tmp_path}: images in folders of classes (cat/images, dog/a) count as of that class"]


def test_files_of_systems_and_programs_are_no_pictures(tmp_path):
    write_files(tmp_path, "cat/1.png", "dog/2.png")
    junk = [
        "cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "dog/@eaDir/2.png/SYNOPHOTO_THUMB.jpg",
        "__MACOSX/cat/._1.png", ".ipynb_checkpoints/x.png", "@eaDir/x.jpg", "cat/Thumbs.db", "$RECYCLE.BIN/1.png",
    ]  # fmt: skip
    write_files(tmp_path, *junk, content=b"no picture")
    write_files(tmp_path, "dog/notes.txt", "dog/film.mpg", "dog/phone.heic", content=b"no picture")
    classes, _, lines = read_folder(tmp_path)
    assert classes == {"cat/1.png": "cat", "dog/2.png": "dog"}
    system = "not used: 8 hidden or system files and folders ($RECYCLE.BIN 1"
    assert any("hidden or system files and folders (" in line and "cat 3, dog 1" in line for line in lines), system
    assert "not used: 3 files that are no images (dog 3), such as dog/film.mpg" in lines


@pytest.mark.parametrize(
    ("files", "folders", "message"),
    [
        (["cat/1.png", "dog/2.png"], ["cow"], "has folders without images: cow; add images or remove"),
        (["cat/1.png", "dog/2.heic"], [], r"without images: dog \(1 other files, such as dog/2.heic\)"),
        (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png"], [], "has no images of dog in its held-out part"),
        (["train/cat/1.png", "val/cat/1.png", "val/dog/1.png"], [], "val has classes that .*train does not have: dog"),
        (["train/cat/1.png", "val/cat/1.png"], ["val/dog"], "/val/ has folders without images: dog"),
        (["train/cat/1.png"], ["val"], "/val has no images"),
        (["val/cat/1.png"], ["train"], "/train has no images"),
    ],
)
def test_empty_and_vanished_classes_are_errors_unless_allowed(files, folders, message, tmp_path):
    write_files(tmp_path, *files)
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), 8)
    if "train has no images" not in message:
        source = open_source(str(tmp_path), 8, LENIENT)
        named = {name for path in [*files, *(f"{folder}/x" for folder in folders)] for name in path.split("/")}
        assert source.class_names == tuple(sorted(named & {"cat", "dog", "cow"}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/cat/1.png", "cat/2.png"], "has train, a split's name, beside cat: give the folder of one split"),
        (["val/cat/1.png", "test/cat/2.png"], "has val, a split's name, beside test|has test, a split's name"),
        (["train/cat/1.png", "Train/cat/2.png", "val/cat/1.png"], "has both .rain and .rain: keep one"),
        (["cat/1.png", "2.png"], r"both class sub-folders \(cat, ...\) and 1 images outside them \(2.png\)"),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(files, message, tmp_path):
    write_files(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), 8)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    write_files(tmp_path, "bus/1.png", "train/2.png", "valid/3.png")
    with pytest.raises(UserError, match="has train, a split's name, beside valid, bus"):
        read_folder(tmp_path)
    (tmp_path / "valid/3.png").rename(tmp_path / "bus/3.png")
    (tmp_path / "valid").rmdir()
    classes, splits, lines = read_folder(tmp_path)
    assert (sorted(set(classes.values())), splits) == (["bus", "train"], {})
    assert lines == [f"{tmp_path}: train is read as a class beside bus, not as a split"]


def test_a_class_whose_images_are_all_unreadable_is_an_error(tmp_path):
    write_files(tmp_path, *(f"cat/{i}.png" for i in range(30)))
    write_files(tmp_path, "dog/1.png", "dog/2.png", content=b"")
    with pytest.raises(UserError, match="no image of dog in .* can be read, such as .*dog/1.png"):
        load_images(str(tmp_path), 8)
    with pytest.raises(UserError, match="no image of dog"):  # images that are decoded when they are needed
        open_dataset(str(tmp_path), 8, DataConfig(random_crop=True), 0)
    assert load_images(str(tmp_path), 8, config=LENIENT).class_names == ("cat", "dog")
    write_files(tmp_path, "dog/3.png")
    assert len(load_images(str(tmp_path), 8)) == 31


# ---- metadata files


def read_table(tmp_path, text: bytes, name="metadata.csv", config=None):
    (tmp_path / name).write_bytes(text)
    return read_folder(tmp_path, config)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbffile_name;label\r\na.png;cat\r\nb.png;dog\r\n;\r\n\r\n",
        b"file_name; label \n a.png ; cat\nb.png; dog\n\n\n",
        b"File_Name\tLabel\na.png\tcat\nb.png\tdog",
        b"sep=;\nfile name;LABEL;note\na.png;cat;x\nb.png;dog\n",
        '\ufefffile_name,label\r\na.png,"cat"\r\nb.png,dog\r\n'.encode("utf-16"),
        b"filename,class\n./a.png,cat\nb.png,dog,,\n",
    ],
)
def test_tables_of_spreadsheets(text, tmp_path):
    write_files(tmp_path, "a.png", "b.png")
    assert read_table(tmp_path, text)[0] == {"a.png": "cat", "b.png": "dog"}


def test_rows_without_a_label_are_left_out_and_said(tmp_path):
    write_files(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    classes, _, lines = read_table(tmp_path, b"file_name,label\na.png,cat\nb.png,dog\nc.png,\nd.png\n")
    assert classes == {"a.png": "cat", "b.png": "dog"}
    assert lines == [
        f"not used: 2 images without a label in metadata.csv, such as {tmp_path}/c.png",
        "not used: 1 images that metadata.csv does not list, such as e.png",
    ]
    classes, _, lines = read_table(tmp_path, b"file_name,label\na.png,0\nb.png,1\nc.png,-1\n")
    assert classes == {"a.png": "0", "b.png": "1"}


def test_windows_paths_and_blank_lines(tmp_path):
    write_files(tmp_path, "pictures/a.png", "pictures/b.png")
    rows = ["", json.dumps({"file_name": "pictures\\a.png", "label": "cat"}), "  "]
    rows += [json.dumps({"file_name": "pictures\\b.png", "label": "dog"}), ""]
    classes = read_table(tmp_path, "\r\n".join(rows).encode(), "metadata.jsonl")[0]
    assert classes == {"pictures/a.png": "cat", "pictures/b.png": "dog"}
    (tmp_path / "metadata.jsonl").unlink()
    assert read_table(tmp_path, b"file_name,label\npictures\\a.png,cat\npictures\\b.png,dog\n")[0] == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'file_name,label\na.png,cat\nb.png,"tabby, grey"\nc.png,a,b\n', r"line 4 has 3 values for 2 columns"),
        (b"file_name,label\na.png,cat\n,dog\n", "line 3 has no file_name"),
        (b"picture,label\na.png,cat\n", "it has the columns picture, label"),
        (b"file_name,label\na.png,cat\na.png,dog\n", "a.png twice, with the labels cat and dog"),
        (b"file_name,label\na.png,\n", "no row has a label in the column label"),
        (b"file_name,label,label\na.png,x,y\n", "has the column 'label' twice"),
        (b"file_name,class,category\na.png,x,y\n", "class and category: choose one with --images.label-column"),
        ("file_name,label\na.png,Kätzchen\n".encode("latin-1"), "cannot read .*; save it in UTF-8"),
        (b"", "it has no rows"),
    ],
)
def test_tables_that_cannot_be_understood_are_refused(text, message, tmp_path):
    write_files(tmp_path, "a.png", "b.png", "c.png")
    with pytest.raises(UserError, match=message):
        read_table(tmp_path, text)


def test_lines_of_numbers_and_texts_are_refused(tmp_path):
    write_files(tmp_path, "a.png", "b.png")
    text = b'{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": "cat"}\n'
    with pytest.raises(UserError, match="label is a text in some rows and a number in others"):
        read_table(tmp_path, text, "metadata.jsonl")
    with pytest.raises(UserError, match="cannot read .*, line 2: "):
        read_table(tmp_path, b'{"file_name": "a.png"}\n{"file_name"\n', "metadata.jsonl")


def test_a_table_without_labels_is_one_class_and_says_so(tmp_path):
    write_files(tmp_path, "a.png", "b.png")
    text = b"file_name,text,kind\na.png,a cat,x\nb.png,a dog,y\n"
    classes, _, lines = read_table(tmp_path, text)
    assert set(classes.values()) == {tmp_path.name}
    assert "has no column label (it has file_name, text, kind): all images are one class" in lines[0]
    assert read_folder(tmp_path, ReadConfig(label_column="Kind"))[0] == {"a.png": "x", "b.png": "y"}
    with pytest.raises(UserError, match="has no column 'sort'; it has file_name, text, kind"):
        read_folder(tmp_path, ReadConfig(label_column="sort"))


@pytest.mark.parametrize("by", ["column", "folder"])
def test_splits_that_a_table_tells(by, tmp_path):
    names = ["train/a.png", "train/b.png", "test/c.png", "test/d.png", "val/e.png", "val/f.png"]
    if by == "column":
        names = [name.replace("/", "-") for name in names]
    write_files(tmp_path, *names)
    head = "file_name,label,split\n" if by == "column" else "file_name,label\n"
    rows = [
        f"{n},{'cat' if i % 2 else 'dog'}{',' + n.split('-')[0] if by == 'column' else ''}\n"
        for i, n in enumerate(names)
    ]
    _, splits, lines = read_table(tmp_path, (head + "".join(rows)).encode())
    assert splits == {"train": names[:2], "held_out": names[4:]}
    assert lines == [f"not used: 2 images of further splits (test 2), such as {tmp_path}/{names[2]}"]


# ---- what is printed


def test_classes_are_printed_with_names_and_counts(tmp_path):
    import torch

    assert format_classes(["cat", "dog"], [torch.tensor([0, 1, 0])]) == "2 classes (images): 0 cat: 2; 1 dog: 1"
    parts = [torch.tensor([0, 1, 0]), torch.tensor([1])]
    assert format_classes(["cat", "dog"], parts) == "2 classes (training + held-out images): 0 cat: 2 + 0; 1 dog: 1 + 1"
    many = torch.arange(1000).repeat_interleave(2)[1:]
    line = format_classes([f"n{i:03d}" for i in range(1000)], [many])
    assert len(line) < 200
    assert line.endswith("; ...; 999 n999: 2; smallest: 0 n000: 1; largest: 1 n001: 2")
    assert list_doubts(["0", "1", "10", "2"], torch.arange(4)) == [
        "the names of the classes are numbers, but not the numbers of the classes: class 2 is named 10"
    ]
    assert list_doubts(["Cat", "cat"], torch.tensor([0])) == [
        "the classes Cat and cat differ only in case or spaces",
        "there are no images of cat to learn from or to measure",
    ]


def test_every_way_to_open_data_prints_the_classes(tmp_path, capsys, monkeypatch):
    """Training (also with a token cache's function), evaluating, and reading into memory; once per run."""
    from nextscale.data.cache import open_examples
    from nextscale.evaluation.images import StoredImages
    from tests.conftest import tiny_config

    write_files(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "dog/3.png", "dog/notes.txt")
    note = "note: not used: 1 files that are no images (dog 1), such as dog/notes.txt\n"
    StoredImages(str(tmp_path), 8)
    assert capsys.readouterr().out == f"2 classes (images): 0 cat: 2; 1 dog: 3\n{note}"
    load_images(str(tmp_path), 8).print_notes()
    assert capsys.readouterr().out == f"2 classes (images): 0 cat: 2; 1 dog: 3\n{note}"
    open_examples(str(tmp_path), tiny_config(), None, DataConfig(held_out=0.4), 0)
    assert capsys.readouterr().out == f"2 classes (training + held-out images): 0 cat: 1 + 1; 1 dog: 2 + 1\n{note}"
    monkeypatch.setenv("RANK", "1")
    StoredImages(str(tmp_path), 8)
    assert capsys.readouterr().out == ""


def test_records_of_earlier_versions_lack_the_new_settings_only():
    from nextscale.config.migrate import migrate_record
    from nextscale.config.parse import to_dict
    from nextscale.config.quickstart import QuickstartConfig
    from nextscale.config.tokenizer_training import TokenizerRunConfig

    for config in (QuickstartConfig(), TokenizerRunConfig()):
        record = to_dict(config)
        for name in to_dict(ReadConfig()):
            del record["images"][name]
        if not record["images"]:
            del record["images"]
        assert migrate_record(record) == to_dict(config)


# ---- parquet


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


# ---- tar


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_webdataset_with_cls(tmp_path):
    for shard in range(2):
        members = {}
        for i in range(2):
            members |= {f"{i:04d}.cls": str(i).encode(), f"{i:04d}.png": encode_png(10 * shard + i)}
        write_tar(tmp_path / "train" / f"{shard:05d}.tar", members)
    write_tar(
        tmp_path / "val" / "0.tar", {"a.png": encode_png(50), "a.cls": b"1\n", "b.png": encode_png(51), "b.cls": b"0"}
    )
    write_files(tmp_path, "classnames.txt", content=b"tench\ngoldfish\n")
    classes, source = read_rows(tmp_path)
    assert source.class_names == ("tench", "goldfish")
    assert classes == {0: "tench", 1: "goldfish", 10: "tench", 11: "goldfish", 50: "goldfish", 51: "tench"}
    assert source.splits == {"train": [0, 1, 2, 3], "held_out": [4, 5]}
    assert source.unused.format_lines() == []
    before = source.fingerprint()
    write_files(tmp_path, "classnames.txt", content=b"goldfish\ntench!\n")
    assert open_source(str(tmp_path), 8).fingerprint() != before
    (tmp_path / "classnames.txt").unlink()
    assert open_source(str(tmp_path), 8).class_names == ("0", "1")


def test_webdataset_with_json(tmp_path):
    def sample(name, value, fields):
        return {f"{name}.png": encode_png(value), f"{name}.json": json.dumps(fields).encode()}

    members = sample("a/0", 0, {"label": "cat", "kind": "x"}) | sample("a/1", 1, {"label": "dog", "kind": "y"})
    members |= sample("a/2", 2, {"kind": "x"}) | {"a/3.json": b'{"label": "dog"}', "__MACOSX/._0.png": b"junk"}
    write_tar(tmp_path / "x.tar", members)
    classes, source = read_rows(tmp_path / "x.tar")
    assert classes == {0: "cat", 1: "dog"}
    assert [line.split(",")[0] for line in source.unused.format_lines()] == [
        "not used: 1 samples without an image",
        "not used: 1 rows without a label",
    ]
    assert read_rows(tmp_path / "x.tar", ReadConfig(label_column="kind"))[0] == {0: "x", 1: "y", 2: "x"}
    with pytest.raises(UserError, match="has no labels 'sort'; its samples have json, png, label, kind"):
        open_source(str(tmp_path / "x.tar"), 8, ReadConfig(label_column="sort"))
    write_tar(tmp_path / "x.tar", members | {"a/0.jpg": encode_png(9)})
    with pytest.raises(UserError, match=r"the sample a/0 has several images \(png, jpg\); choose one with --images.im"):
        open_source(str(tmp_path / "x.tar"), 8)
    assert read_rows(tmp_path / "x.tar", ReadConfig(image_column="png"))[0] == {0: "cat", 1: "dog"}


def test_folders_in_a_tar(tmp_path):
    members = {f"./photos/{name}/{i}.png": encode_png(i) for i, name in enumerate(("cat", "dog"))}
    write_tar(tmp_path / "x.tar", members | {"photos/cat/._0.png": b"junk"})
    assert read_rows(tmp_path / "x.tar")[0] == {0: "cat", 1: "dog"}
    examples = load_images(str(tmp_path / "x.tar"), 8)
    assert (len(examples), examples.class_names) == (2, ("cat", "dog"))


def test_damaged_and_packed_tars_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, {"0.png": bytes(3000), "0.cls": b"1", "1.png": bytes(3000), "1.cls": b"0"})
    whole = path.read_bytes()
    for content in (b"junk", whole[:5000], whole[:2000] + b"x" * 512 + whole[2512:3584] + b"y" * 512 + whole[4096:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="x.tar is damaged"):
            open_source(str(path), 8)
    write_tar(path, {"n01.tar": whole})
    with pytest.raises(UserError, match=r"holds archives \(n01.tar\), no images: unpack it"):
        open_source(str(path), 8)
    write_files(tmp_path, "x.tar.gz")
    with pytest.raises(UserError, match="x.tar.gz is compressed"):
        open_source(str(tmp_path / "x.tar.gz"), 8)


def test_options_that_do_not_apply_are_refused(tmp_path):
    write_files(tmp_path, "cat/1.png", "dog/2.png")
    for data in (str(tmp_path), "digits"):
        with pytest.raises(UserError, match="no table with a column 'fine'|digits have no columns"):
            open_source(data, 8, ReadConfig(label_column="fine"))


# ---- random trees and tables against a plain reading of them

NAMES = st.sampled_from(["cat", "Cat", "dog", "2", "10", "a b", "zebra-1", "valid_x", "été"])
FILES = st.sampled_from(["1.png", "2.PNG", "b.jpg", "c.jpeg", "x.y.webp"])
JUNK = st.sampled_from(["notes.txt", "Thumbs.db", "._1.png", ".DS_Store", "film.mp4", "@eaDir/1.png", ".git/1.png"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    classes=st.dictionaries(NAMES, st.sets(FILES, min_size=1, max_size=3), min_size=2, max_size=4),
    junk=st.sets(st.tuples(NAMES, JUNK), max_size=4),
    split=st.sampled_from([(), ("train",), ("Train", "Val"), ("training", "TEST")]),
    wrapper=st.sampled_from(["", "images/", "a/b/"]),
)
def test_random_folders_mean_what_their_paths_say(classes, junk, split, wrapper, tmp_path_factory):
    """Each image's class is the name of its folder, its part the name of the split, whatever lies beside it."""
    root = tmp_path_factory.mktemp("tree")
    expected = {
        f"{wrapper}{part}{name}/{file}": (part, name)
        for part in ([f"{s}/" for s in split] or [""])
        for name, files in classes.items()
        for file in files
    }
    left_out = {
        f"{wrapper}{part}{name}/{file}"
        for part in ([f"{s}/" for s in split] or [""])
        for name, file in junk
        if name in classes
    }
    write_files(root, *expected, *left_out)
    found, splits, lines = read_folder(root)
    assert found == {path: name for path, (_, name) in expected.items()}
    parts = [path.removeprefix(wrapper).split("/") for path in found]
    assert parts == sorted(parts, key=lambda words: (split.index(words[0]) if split else 0, words))
    if len(split) == 2:
        for key, part in zip(("train", "held_out"), split, strict=True):
            assert set(splits[key]) == {path for path, (where, _) in expected.items() if where == f"{part}/"}
    else:
        assert splits == {}
    counted = sum(int(line.split()[2]) for line in lines if line.startswith("not used: "))
    assert counted == len({"/".join(path.split("/")[: path.count("/") - ("@" in path or ".git" in path) + 1])
                           for path in left_out})  # fmt: skip


LABELS = st.sampled_from(["cat", "dog", "7", "a, b", 'say "x"', "  padded", "", "  "])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    labels=st.lists(LABELS, min_size=1, max_size=6),
    delimiter=st.sampled_from([",", ";", "\t"]),
    bom=st.booleans(),
    ends=st.sampled_from(["\n", "\r\n"]),
    blank=st.integers(0, 3),
    extra=st.booleans(),
    form=st.sampled_from(["csv", "jsonl"]),
)
def test_random_tables_mean_what_their_rows_say(labels, delimiter, bom, ends, blank, extra, form, tmp_path_factory):
    """Each listed file has its row's label without spaces around it; rows without one are left out and counted."""
    root = tmp_path_factory.mktemp("table")
    names = [f"{i}.png" for i in range(len(labels))]
    write_files(root, *names)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter, lineterminator=ends)
        writer.writerow([" File_Name", "label "] + ["note"] * extra)
        writer.writerows([name, label] for name, label in zip(names, labels, strict=True))
        text = out.getvalue() + (delimiter + ends) * blank
    else:
        rows = [json.dumps({"file_name": n, "label": label.strip()}) for n, label in zip(names, labels, strict=True)]
        text = ends.join(rows + [""] * blank)
    (root / f"metadata.{form}").write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    expected = {name: label.strip() for name, label in zip(names, labels, strict=True) if label.strip()}
    if not expected:
        with pytest.raises(UserError, match="no row has a label"):
            read_folder(root)
        return
    found, _, lines = read_folder(root)
    assert found == expected
    missing = len(names) - len(expected)
    assert [line.split(",")[0] for line in lines] == (
        [f"not used: {missing} images without a label in metadata.{form}"] if missing else []
    )


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
