"""Data sets in tar files: WebDataset shards, and folders."""

import io
import json
import tarfile

import pytest

from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from nextscale.data.datasets import load_images
from nextscale.data.sources import open_source
from tests.test_parquet import read_rows
from tests.test_sources import encode_png, write_files


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
