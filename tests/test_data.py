"""Where examples come from: the same pictures by every road, in an order that nobody's presence changes."""

import io
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig
from nextscale.data.cache import TokenCache, fingerprint_tokenizer
from nextscale.data.cache_writer import CacheWriter
from nextscale.data.datasets import ImageExamples, load_images, open_dataset, split_rows
from nextscale.data.examples import BatchDataset, MemoryExamples, load_batches
from nextscale.data.images import crop_randomly, resize_and_crop
from nextscale.data.sources import open_source
from nextscale.data.sources.folder import open_folder
from nextscale.data.sources.parquet import Parquet
from nextscale.tokenizer.tokenizer import scale_to_unit
from tests.conftest import randomised, tiny_config


def png(value: int, size=(11, 9)) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder, count=24):
    for i in range(count):
        path = folder / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))


def write_parquet(path, rows, group=4):
    import pyarrow as arrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = arrow.table({"image": [{"bytes": png(i), "path": None} for i in rows], "label": [i % 2 for i in rows]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_labels_that_a_metadata_file_lists(form, tmp_path):
    """Hugging Face's imagefolder with metadata: labels come from the file, not from the folders."""
    (tmp_path / "images").mkdir()
    rows = [{"file_name": f"images/{i}.png", "label": ("cat", "dog")[i % 2]} for i in range(4)]
    for i, row in enumerate(rows):
        (tmp_path / row["file_name"]).write_bytes(png(i))
    table = tmp_path / f"metadata.{form}"
    if form == "csv":
        table.write_text("file_name,label\n" + "".join(f"{r['file_name']},{r['label']}\n" for r in rows))
    else:
        table.write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = open_source(str(tmp_path), 8)
    assert source.class_names == ("cat", "dog")
    assert source.labels == [0, 1, 0, 1]
    assert [name for name, _ in map(source.read, range(4))] == [str(tmp_path / r["file_name"]) for r in rows]
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(UserError, match=r"lists 1 files that do not exist, such as .*images/3.png"):
        open_source(str(tmp_path), 8)
    table.write_text("name,label\nx,y\n" if form == "csv" else '{"name": "x"}\n')
    with pytest.raises(UserError, match="must list file_name and label in every row"):
        open_source(str(tmp_path), 8)


@pytest.fixture(scope="module")
def roads(tmp_path_factory):
    """The same 24 pictures as class folders, as one table, and as a folder of tables."""
    root = tmp_path_factory.mktemp("roads")
    write_folder(root / "folder")
    write_parquet(root / "one.parquet", range(24))
    for part in range(3):
        write_parquet(root / "shards" / f"data-{part:05d}.parquet", range(part * 8, part * 8 + 8))
    return [str(root / name) for name in ("folder", "one.parquet", "shards")]


def by_content(examples: ImageExamples) -> dict[bytes, int]:
    batch = examples.fetch(range(len(examples)), None)
    return {image.numpy().tobytes(): int(label) for image, label in zip(batch["image"], batch["label"], strict=True)}


def test_the_same_pictures_by_every_road(roads):
    expected = {}
    for i in range(24):
        image = resize_and_crop(Image.open(io.BytesIO(png(i))), (8, 8))
        expected[np.array(image).transpose(2, 0, 1).tobytes()] = i % 2
    for road in roads:
        data = load_images(road, 8)
        assert data.class_names == ("cat", "dog")
        assert by_content(data.to_examples()) == expected
        source = open_source(road, 8)
        lazy = ImageExamples(torch.tensor(source.labels), source=source, rows_B=torch.arange(24), size=8)
        assert by_content(lazy) == expected


def test_in_memory_or_not_the_split_and_the_examples_are_the_same(roads, monkeypatch):
    from nextscale.data import datasets

    config = DataConfig(held_out=0.25, flip=True, limit=20)
    near = open_dataset(roads[1], 8, config, seed=3)
    monkeypatch.setattr(datasets, "_MEMORY_LIMIT", 0)
    far = open_dataset(roads[1], 8, config, seed=3)
    assert near[0].memory_B3HW is not None
    assert far[0].memory_B3HW is None
    for a, b in zip(near[:2], far[:2], strict=True):
        assert len(a) == len(b)
        one, two = (e.fetch(range(len(a)), range(100, 100 + len(a))) for e in (a, b))
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["label"], two["label"])


def test_tables_are_shuffled_group_by_group(tmp_path):
    """Every row once per epoch, in another order each time, while each row group is read about once."""
    write_parquet(tmp_path / "many.parquet", range(160), group=2)
    source = Parquet("many", [str(tmp_path / "many.parquet")], "")
    reads = 0
    original = source._open(0).read_row_group

    class Counting:
        def read_row_group(self, *args):
            nonlocal reads
            reads += 1
            return original(*args)

    source._open_files[0] = Counting()
    orders = [source.order(torch.arange(160), torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(160))
        assert (order[1:] - order[:-1] != 1).float().mean() > 0.9
    assert not torch.equal(*orders)
    for row in orders[0].tolist():
        assert source.read(row)[1] == png(row)
    assert reads <= 80 + 5


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_split_that_comes_with_the_data_is_kept(kind, tmp_path):
    if kind == "folder":
        write_folder(tmp_path / "train", 10)
        write_folder(tmp_path / "val", 4)
    else:
        write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", range(10))
        write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", range(4))
        write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(100, 102))
    train, held_out, source = open_dataset(str(tmp_path), 8, DataConfig(held_out=0.5), seed=0)
    assert (len(train), len(held_out), source.class_names) == (10, 4, ("cat", "dog"))
    assert by_content(held_out).items() <= by_content(train).items()  # the same pictures on purpose
    if kind == "folder":
        (tmp_path / "val" / "cow").mkdir()
        (tmp_path / "val" / "cow" / "x.png").write_bytes(png(1))
        with pytest.raises(UserError, match="val has classes that .*train does not have: cow"):
            open_folder(tmp_path)


def test_a_share_of_every_class_is_held_out():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2])
    train, held = split_rows(labels, None, 0.1, seed=1)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(61))
    assert torch.bincount(labels[held], minlength=3).tolist() == [5, 1, 0]


def test_random_crop_is_var_s():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((54, 36), Image.Resampling.LANCZOS))  # 1.125 x 32 = 36 on the short side
    for draws, left, top in (((0.0, 0.0), 0, 0), ((0.999, 0.999), 22, 4), ((0.5, 0.5), 11, 2)):
        cropped = np.asarray(crop_randomly(image, 32, draws))
        np.testing.assert_array_equal(cropped, resized[top : top + 32, left : left + 32])


def test_what_is_random_belongs_to_the_place_alone(roads):
    source = open_source(roads[0], 8)
    examples = ImageExamples(
        torch.tensor(source.labels), True, 5, source=source, rows_B=torch.arange(24), size=8, random_crop=True
    )
    together = examples.fetch([3, 4, 3], [7, 8, 9])["image"]
    alone = torch.cat([examples.fetch([i], [p])["image"] for i, p in ((3, 7), (4, 8), (3, 9))])
    assert torch.equal(together, alone)
    views = {examples.fetch([3], [place])["image"].numpy().tobytes() for place in range(40)}
    assert len(views) >= 6  # one or two by two cuts here, mirrored or not


def test_workers_change_nothing(roads):
    train, _, _ = open_dataset(roads[1], 8, DataConfig(random_crop=True, flip=True, held_out=0.25), seed=0)
    spans = [(start, start + 5) for start in range(0, 40, 5)]
    runs = [list(load_batches(BatchDataset(train, 0, "t"), spans, workers, pin=False)) for workers in (0, 2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


class Deadly(MemoryExamples):
    def fetch(self, indices, positions):
        if 30 in positions:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch(indices, positions)


def test_a_data_worker_that_dies_costs_nothing(tmp_path):
    from dataclasses import replace

    from nextscale.common.distributed import World
    from nextscale.training.engine.loop import train
    from nextscale.training.engine.state import StateFiles
    from tests.test_train import SETTINGS, tasks

    task = tasks(randomised(tiny_config()))[1]
    task.examples = Deadly(**task.examples.tensors)
    config = replace(SETTINGS, workers=1, steps=20, save_every=100)
    with pytest.raises(UserError, match=r"worker .*; the state after step [1-5] is saved"):
        train(task, config, tmp_path)
    assert 1 <= StateFiles(tmp_path, "transformer", 2, World()).list_steps()[0] <= 5


def cache_parts(tokenizer, count=21, held=5):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count + held, 3, 8, 8), generator=rng, dtype=torch.uint8)
    labels = torch.arange(count + held) % 3
    return {
        "train": ImageExamples(labels[:count], flip=True, memory_B3HW=images[:count]),
        "held_out": ImageExamples(labels[count:], memory_B3HW=images[count:]),
    }


def test_the_cache_holds_what_the_tokenizer_says(tmp_path):
    tokenizer = randomised(tiny_config()).tokenizer
    parts = cache_parts(tokenizer)
    writer = CacheWriter(tmp_path, tokenizer, parts, views=3, shard=8)
    writer.record_settings(("a", "b", "c"), {"seed": 0})
    writer.write(batch=4, show=False)
    cache = TokenCache(tmp_path)
    train, held = cache.load_examples("train"), cache.load_examples("held_out")
    assert (len(train), len(held), cache.class_names) == (21, 5, ("a", "b", "c"))
    for epoch in range(4):
        places = [epoch * 21 + i for i in range(21)]
        batch = train.fetch(range(21), places)
        for i in range(21):
            view = (epoch + i) % 3
            image = parts["train"].fetch([i], [view * 21 + i])["image"]
            assert torch.equal(batch["tokens"][i].long(), tokenizer.encode(scale_to_unit(image))[0])
    assert torch.equal(train.fetch(range(21), None)["label"], parts["train"].labels_B)
    images = parts["held_out"].fetch(range(5), None)["image"]
    assert torch.equal(held.fetch(range(5), None)["tokens"].long(), tokenizer.encode(scale_to_unit(images)))
    assert sorted(train.order(torch.Generator()).tolist()) == list(range(21))


def test_an_unfinished_cache_goes_on_and_a_foreign_one_is_refused(tmp_path):
    tokenizer = randomised(tiny_config()).tokenizer
    writer = CacheWriter(tmp_path, tokenizer, cache_parts(tokenizer), views=1, shard=8)
    writer.record_settings(("a",), {"seed": 0})
    writer.write(show=False)
    files = {p.name: p.read_bytes() for p in tmp_path.glob("[th]*.safetensors")}
    assert len(files) == 4
    (tmp_path / "train-00001.safetensors").unlink()
    (tmp_path / ".train-00001.99.part.safetensors").write_bytes(b"half a shard")
    with pytest.raises(UserError, match=r"train-00001.safetensors is missing: the cache is unfinished"):
        TokenCache(tmp_path).load_examples("train")
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("[th]*.safetensors")}
    again = CacheWriter(tmp_path, tokenizer, cache_parts(tokenizer), views=1, shard=8)
    again.record_settings(("a",), {"seed": 0})
    again.write(show=False)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")} == files
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in times.items())
    assert not list(tmp_path.glob(".*"))

    other = randomised(tiny_config(), seed=1).tokenizer
    with pytest.raises(UserError, match="made by another tokenizer"):
        TokenCache(tmp_path).check_tokenizer(other)
    with pytest.raises(UserError, match="holds a cache with other settings .tokenizer was .*seed was 0, now 1"):
        CacheWriter(tmp_path, other, cache_parts(other), views=1, shard=8).record_settings(("a",), {"seed": 1})
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.add_(1)
    assert fingerprint_tokenizer(tokenizer) == TokenCache(tmp_path).head["tokenizer"], "the decoder decides no token"
    (tmp_path / "held_out-00000.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"held_out-00000.safetensors is damaged"):
        TokenCache(tmp_path).load_examples("held_out")


def test_several_processes_make_one_cache(tmp_path):
    tokenizer = randomised(tiny_config()).tokenizer
    for folder, size in (("one", 1), ("three", 3)):
        for rank in range(size):
            writer = CacheWriter(tmp_path / folder, tokenizer, cache_parts(tokenizer), views=2, shard=4)
            writer.record_settings(("a",), {})
            writer.write(rank, size, show=False)
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("one", "three"))
    assert one == three
