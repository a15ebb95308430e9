"""Metadata tables beside the images: how they are written, what they leave out, what is refused."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from tests.test_sources import read_folder, write_files


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


# ---- random tables against a plain reading of them

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
