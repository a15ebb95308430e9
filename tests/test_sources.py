"""Data sets as people have them: each layout is understood, and what is not used is said, by class and reason."""

import io

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
        "some classes differ only in case or spaces: Cat and cat",
        "there are no images of cat to learn from or to measure",
    ]


def test_letters_of_both_cases_are_one_note():
    import torch

    letters = [chr(ord("A") + i) for i in range(26)] + [chr(ord("a") + i) for i in range(26)]
    (note,) = list_doubts(letters, torch.arange(52))
    assert note.startswith("some classes differ only in case or spaces: A and a, B and b, C and c")
    assert len(note) < 160


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


def test_options_that_do_not_apply_are_refused(tmp_path):
    write_files(tmp_path, "cat/1.png", "dog/2.png")
    for data in (str(tmp_path), "digits"):
        with pytest.raises(UserError, match="no table with a column 'fine'|digits have no columns"):
            open_source(data, 8, ReadConfig(label_column="fine"))


# ---- random folders against a plain reading of them

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
