"""Captions of data sets: read from tables, files and archives, and given in batches."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.common.text import cut_text
from nextscale.config.data import DataConfig, ReadConfig
from nextscale.data.cache import TokenCache, open_examples
from nextscale.data.captions import CaptionBytes, TextInput
from nextscale.data.datasets import open_dataset
from nextscale.data.examples import BatchDataset, load_batches
from nextscale.data.sources import open_source
from nextscale.data.sources.captions import Captions
from tests.conftest import randomised, tiny_config
from tests.test_parquet import class_label, images, write_table
from tests.test_sources import encode_png, write_files


def read_captions(path, **config):
    """The captions of each image, by the grey of the picture, and the source."""
    source = open_source(str(path), 8, ReadConfig(**config), captioned=True)
    return {grey_of(source, i): source.captions[i] for i in range(len(source.labels))}, source


def grey_of(source, i):
    from PIL import Image

    picture = source.read(i)[1]
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture).getpixel((0, 0))[0]


# ---- tables


def test_a_table_has_captions_in_a_column_of_texts_or_of_lists(tmp_path):
    texts = ["a cat", " two dogs\n", "żółw", "a hen"]
    write_table(tmp_path / "a.parquet", image=images(4), caption=texts, text=["other"] * 4)
    captions, source = read_captions(tmp_path / "a.parquet")
    assert captions == {0: ("a cat",), 1: ("two dogs",), 2: ("żółw",), 3: ("a hen",)}
    assert (source.class_names, set(source.labels)) == (("a",), {0}), "without labels all images are one class"
    lists = [["a cat", "an animal"], ["two dogs"], [], ["a hen", "", "a hen"]]
    write_table(tmp_path / "b.parquet", image=images(4), text=lists, own=texts)
    captions, source = read_captions(tmp_path / "b.parquet")
    assert captions == {0: ("a cat", "an animal"), 1: ("two dogs",), 2: ("",), 3: ("a hen",)}
    assert source.unused.format_lines() == [
        "1 of 4 images have no caption, such as row 2: they have the empty caption",
        "not used: 1 empty captions, such as row 3",
    ]
    assert read_captions(tmp_path / "b.parquet", caption_column="own")[0][2] == ("żółw",)


def test_a_table_may_have_captions_and_labels_and_a_split(tmp_path):
    features = {"label": class_label("cat", "dog")}
    for split, first, labels in (("train", 0, [1, 0, -1, 1]), ("test", 50, [0, 1])):
        texts = [f"{split} {i}" for i in range(len(labels))]
        path = tmp_path / f"{split}.parquet"
        write_table(path, features, image=images(len(labels), first), label=labels, caption=texts)
    captions, source = read_captions(tmp_path)
    assert captions == {0: ("train 0",), 1: ("train 1",), 3: ("train 3",), 50: ("test 0",), 51: ("test 1",)}
    assert [source.class_names[label] for label in source.labels] == ["cat", "dog", "dog", "cat", "dog"]
    assert source.splits == {"train": [2, 3, 4], "held_out": [0, 1]}
    assert open_source(str(tmp_path), 8).captions is None, "captions are read where they are asked for"


def test_the_split_is_kept_where_there_are_no_labels(tmp_path):
    for split, first in (("train", 0), ("validation", 50)):
        write_table(tmp_path / f"{split}.parquet", image=images(3, first), caption=[f"{split} {i}" for i in range(3)])
    _, source = read_captions(tmp_path)
    assert source.splits == {"train": [0, 1, 2], "held_out": [3, 4, 5]}
    with pytest.raises(UserError, match="has no column 'label'"):
        open_source(str(tmp_path), 8)


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"label": [0, 1]}, {}, r"has no captions: no column 'caption'; it has image, label; choose .*caption-column"),
        ({"text": ["a", "b"]}, {"caption_column": "txt"}, r"no column 'txt'; it has image, text"),
        ({"caption": [3, 4]}, {}, r"column 'caption' holds int64, not captions"),
        ({"caption": [" ", ""]}, {}, r"has captions without any text, such as of row 0"),
        ({"caption": [[["a"]], [["b"]]]}, {}, r"holds list<.*, not captions"),
    ],
)
def test_captions_that_are_absent_or_no_texts_are_refused(tmp_path, columns, config, message):
    write_table(tmp_path / "x.parquet", image=images(2), **columns)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "x.parquet", **config)


def test_a_column_of_captions_that_nothing_uses_is_named(tmp_path):
    write_table(tmp_path / "x.parquet", image=images(4), label=[0, 1, 0, 1], caption=["a", "b", "c", "d"])
    config = DataConfig(caption_column="caption", held_out=0.5)
    train, _, source = open_dataset(str(tmp_path / "x.parquet"), 8, config, 0)
    assert (source.captions, train.captions) == (None, None)
    assert train.notes == ["captions are not used here, so --images.caption-column has no effect"]


# ---- folders


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_metadata_of_a_folder_has_captions(tmp_path):
    write_files(tmp_path, *(f"{i}.png" for i in range(4)))
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(3)]
    rows += [{"file_name": "3.png", "text": ["one", "two"]}, {"file_name": "0.png", "text": "again"}]
    write_lines(tmp_path / "metadata.jsonl", rows)
    _, source = read_captions(tmp_path)
    assert [source.captions[i] for i in range(4)] == [
        ("caption 0", "again"), ("caption 1",), ("caption 2",), ("one", "two"),
    ]  # fmt: skip
    assert not source.unused.format_lines(), "a table of captions needs no labels"
    write_lines(tmp_path / "metadata.jsonl", [{**row, "label": "ab"[i % 2]} for i, row in enumerate(rows[:4])])
    _, source = read_captions(tmp_path)
    assert (source.class_names, source.labels) == (("a", "b"), [0, 1, 0, 1])
    assert source.captions[3] == ("one", "two")
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": {"en": "a"}}])
    with pytest.raises(UserError, match=r"line 1: text must hold a text, or a list of texts"):
        read_captions(tmp_path)


def test_a_table_of_a_spreadsheet_has_captions(tmp_path):
    write_files(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text(
        'File Name;Caption;label\n0.png;"red; round";a\n1.png;;b\n', encoding="utf-8"
    )
    _, source = read_captions(tmp_path)
    assert [source.captions[i] for i in range(2)] == [("red; round",), ("",)]
    assert "1 of 2 images have no caption" in source.unused.format_lines()[0]
    with pytest.raises(UserError, match="has no column 'txt'; it has file_name, caption, label"):
        read_captions(tmp_path, caption_column="txt")


def test_an_unnamed_column_is_no_label(tmp_path):
    write_files(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text(",file_name,caption\n0,0.png,red\n1,1.png,blue\n", encoding="utf-8")
    assert len(open_source(str(tmp_path), 8).class_names) == 1


def test_text_files_beside_the_images_have_a_caption_in_each_line(tmp_path):
    write_files(tmp_path, "cat/1.png", "cat/2.x.png", "dog/3.png")
    (tmp_path / "cat/1.txt").write_text("a cat\nblack\n\n", encoding="utf-8")
    (tmp_path / "cat/2.x.TXT").write_bytes(b"\xef\xbb\xbfwhite\r\n")
    (tmp_path / "dog/other.txt").write_text("no caption")
    _, source = read_captions(tmp_path)
    assert [source.captions[i] for i in range(3)] == [("a cat", "black"), ("white",), ("",)]
    assert source.class_names == ("cat", "dog")
    assert [line.split(", such as ")[0] for line in source.unused.format_lines()] == [
        "1 of 3 images have no caption", "not used: 1 empty captions", "not used: 1 files that are no images (dog 1)",
    ]  # fmt: skip
    assert "3 files that are no images" in open_source(str(tmp_path), 8).unused.format_lines()[0]
    with pytest.raises(UserError, match="has no table with a column 'mine'"):
        read_captions(tmp_path, caption_column="mine")
    for path in tmp_path.rglob("*.[tT]*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no captions: expected a metadata.jsonl .* such as cat/1.txt for cat/1.png"):
        read_captions(tmp_path)
    with pytest.raises(UserError, match="digits have no captions"):
        open_source("digits", 8, captioned=True)


# ---- archives


def write_archive(path, **members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("where", ["text", "field", "asked"])
@pytest.mark.parametrize("labelled", [False, True])
def test_samples_of_an_archive_have_captions(tmp_path, where, labelled):
    members = {}
    for i in range(3):
        texts = {"text": f"number {i}\nor so", "field": [f"number {i}", "or so"], "asked": f"number {i}"}[where]
        name = {"text": "txt", "field": "json", "asked": "cap"}[where]
        members[f"{i}.png"] = encode_png(i)
        members[f"{i}.{name}"] = json.dumps({"captions": texts}) if where == "field" else texts
        members |= {f"{i}.cls": str(i % 2)} if labelled else {}
    write_archive(tmp_path / "x.tar", **members)
    captions, source = read_captions(tmp_path / "x.tar", caption_column="cap" if where == "asked" else "")
    more = () if where == "asked" else ("or so",)
    assert captions == {i: (f"number {i}", *more) for i in range(3)}
    assert len(source.class_names) == 1 + labelled
    with pytest.raises(UserError, match="has no captions 'mine'; its samples have"):
        read_captions(tmp_path / "x.tar", caption_column="mine")


# ---- the store, and bytes in batches


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.text(max_size=8), max_size=4), min_size=1, max_size=6), st.data())
def test_captions_are_kept_as_they_are(lists, data):
    captions = Captions.from_lists(lists)
    expected = [tuple(entry) or ("",) for entry in lists]
    assert [captions[i] for i in range(len(captions))] == expected
    index = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))
    chosen = captions.select(np.array(index, np.int64))
    assert [chosen[i] for i in range(len(chosen))] == [expected[i] for i in index]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12), st.integers(1, 20))
def test_a_long_caption_is_cut_at_a_whole_character(text, limit):
    whole = [text[:n].encode() for n in range(len(text) + 1)]
    assert cut_text(text.encode(), limit) == max((c for c in whole if len(c) <= limit), key=len)


def test_the_position_in_the_run_decides_which_caption_is_shown():
    captions = Captions.from_lists([["zero"], ["eins", "zwei", "größer als acht"], [], ["a", "b"]])
    texts = CaptionBytes(captions, 8, seed=3)
    indices, positions = [1, 3, 0, 2] * 30, list(range(120))
    batch = texts.fetch(indices, positions)
    assert (batch["text"].shape, batch["text"].dtype) == ((120, 8), torch.uint8)
    shown = [bytes(row[:n].tolist()).decode() for row, n in zip(batch["text"], batch["text_length"], strict=True)]
    assert not any(row[n:].any() for row, n in zip(batch["text"], batch["text_length"], strict=True))
    for i, position, text in zip(indices, positions, shown, strict=True):
        count = len(captions[i])
        n = int(torch.randint(count, (), generator=make_generator(3, "caption", position))) if count > 1 else 0
        assert text == ("größer" if len(captions[i][n]) > 8 else captions[i][n])
    assert {text for i, text in zip(indices, shown, strict=True) if i == 1} == {"eins", "zwei", "größer"}
    alone = [texts.fetch([i], [p])["text"] for i, p in zip(indices, positions, strict=True)]
    assert torch.equal(torch.cat(alone), batch["text"]), "the batch does not matter"
    first = texts.fetch([1, 2, 3], None)
    assert first["text_length"].tolist() == [4, 0, 1]
    assert bytes(first["text"][0, :4].tolist()) == b"eins"


# ---- examples and the cache


def write_captioned(path, count=24, broken=()):
    """A table in which row i has the grey i and the captions "i.0" to "i.2", fewer for some rows."""
    pictures = [{"bytes": b"" if i in broken else encode_png(i), "path": None} for i in range(count)]
    lists = [[f"{i}.{n}" for n in range(i % 4)] for i in range(count)]
    write_table(path, image=pictures, caption=lists, label=[i % 2 for i in range(count)])


def read_text(batch):
    return [bytes(row[:n].tolist()).decode() for row, n in zip(batch["text"], batch["text_length"], strict=True)]


@pytest.mark.parametrize("decoded", [False, True])
def test_every_image_has_its_own_caption(tmp_path, decoded):
    """Also where an unreadable image is replaced by the next one, which has captions of its own."""
    write_captioned(tmp_path / "x.parquet", broken=(5, 6))
    config = DataConfig(held_out=0.25, random_crop=decoded, max_unreadable=0.5)
    train, held_out, _ = open_dataset(str(tmp_path / "x.parquet"), 8, config, 0, captioned=True)
    seen = set()
    for part in (train, held_out):
        part.texts = CaptionBytes(part.captions, 8, 0)
        batch = part.fetch(range(len(part)), None)
        for image, text in zip(batch["image"], read_text(batch), strict=True):
            grey = int(image[0, 0, 0])
            assert text == (f"{grey}.0" if grey % 4 else ""), grey
            seen.add(grey)
    assert seen == {*range(24)} - {5, 6}


def write_model_and_captions(folder):
    randomised(tiny_config()).save_pretrained(folder / "model")
    write_captioned(folder / "x.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model_and_captions(tmp_path_factory.mktemp("captions"))


def tokenize(folder, out, *options):
    command = ["tokenize", folder / "x.parquet", "--tokenizer", folder / "model", "--out", out, "--shard", "7"]
    return main([*map(str, command), "--images.held-out", "0.25", *options])


def open_both(folder, out, text):
    """Training and held-out examples of the images and of the cache."""
    tokenizer, config = randomised(tiny_config()).tokenizer, DataConfig(held_out=0.25)
    both = (open_examples(str(data), tiny_config(), tokenizer, config, 0, text) for data in (folder / "x.parquet", out))
    return [parts[:2] for parts in both]


def test_a_cache_gives_the_captions_that_the_images_give(model, tmp_path, capsys):
    assert tokenize(model, tmp_path / "cache", "--captions") == 0
    assert "note: 36 captions of 24 images" in capsys.readouterr().out
    images_, cached = open_both(model, tmp_path / "cache", TextInput("bytes", 3))
    assert "23 of 36 captions have more than 3 bytes, up to 4: they are cut" in capsys.readouterr().out
    for one, other in zip(images_, cached, strict=True):
        assert [one.captions[i] for i in range(len(one))] == [other.captions[i] for i in range(len(other))]
        rows = [(i * 5) % len(one) for i in range(40)]
        for positions in (None, range(40)):
            mine, theirs = one.fetch(rows, positions), other.fetch(rows, positions)
            assert torch.equal(mine["text"], theirs["text"])
            assert torch.equal(mine["text_length"], theirs["text_length"])
    plain = TokenCache(tmp_path / "cache").load_examples("train").fetch([0, 9], [0, 1])
    assert sorted(plain) == ["label", "tokens"], "captions are in a batch where they are asked for"


def test_workers_give_the_same_captions(model, tmp_path):
    assert tokenize(model, tmp_path / "cache", "--captions") == 0
    for train, _ in open_both(model, tmp_path / "cache", TextInput("bytes", 8)):
        dataset = BatchDataset(train, 0, "train")
        spans = [(0, 10), (10, 40)]
        here, there = (list(load_batches(dataset, spans, workers, False)) for workers in (0, 1))
        assert [read_text(a) for a in here] == [read_text(b) for b in there]
        one = [text for p in range(40) for text in read_text(dataset[(p, p + 1)])]
        assert [text for batch in here for text in read_text(batch)] == one


def test_a_cache_without_captions_says_how_to_get_them(model, tmp_path, capsys):
    assert tokenize(model, tmp_path / "cache") == 0
    assert "text" not in TokenCache(tmp_path / "cache").head, "a cache without captions is as it was"
    with pytest.raises(
        UserError, match="holds no captions: make it again with `nextscale tokenize --captions` or with"
    ):
        open_both(model, tmp_path / "cache", TextInput("bytes", 8))
    assert tokenize(model, tmp_path / "cache", "--captions") == 2
    assert "holds a cache with other settings (text was None, now {" in capsys.readouterr().err
    assert tokenize(model, tmp_path / "captioned", "--captions") == 0
    with pytest.raises(UserError, match="holds captions, but no embeddings of them"):
        TokenCache(tmp_path / "captioned").load_examples("train").with_text(TextInput("embeddings"), 0)
    with pytest.raises(UserError, match=r"is a data set of images: embeddings of its captions come from a token cache"):
        open_both(model, tmp_path / "captioned", TextInput("embeddings"))
    assert tokenize(model, tmp_path / "captioned") == 2
    assert "(text was {" in capsys.readouterr().err
    assert tokenize(model, tmp_path / "captioned", "--captions") == 0
    assert "complete already" in capsys.readouterr().out


def test_changed_captions_are_noticed(model, tmp_path, capsys):
    """Also in a file of the same size and time."""
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "x.parquet"
    (tmp_path / "model").symlink_to(model / "model")
    for text, status in (("11.0", 0), ("11.9", 2)):
        columns = {"image": images(8), "caption": [text] * 8}
        parquet.write_table(pyarrow.table(columns), table, compression="none")
        os.utime(table, ns=(10**9, 10**9))
        assert tokenize(tmp_path, tmp_path / "cache", "--captions") == status
    assert f"the captions of {table} have changed" in capsys.readouterr().err
