"""Damaged shards: of a token cache, of features that evaluate keeps, of samples that sparsify draws."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextscale.checkpoints.shards import read_owner
from nextscale.checkpoints.verify import verify
from nextscale.common.files import write_json
from nextscale.common.reading import read_json
from nextscale.config.files import record_settings
from nextscale.data.cache import TokenCache
from nextscale.data.cache_writer import CacheWriter
from nextscale.encoders.network import Features
from nextscale.evaluation.extract import Extraction, extract_features, read_features, record_extraction
from nextscale.sparsify.data import _load_samples, _shard_path, write_shard
from tests.conftest import randomised, tiny_config
from tests.test_damage import flip_byte, refuse
from tests.test_data import cache_parts


def write_cache(folder, seed=0):
    tokenizer = randomised(tiny_config()).tokenizer
    writer = CacheWriter(folder, tokenizer, cache_parts(tokenizer), views=2, shard=8)
    writer.record_settings(("a", "b", "c"), {"seed": seed})
    writer.write(show=False)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Two caches of the same tokenizer and other data, by their seeds."""
    place = tmp_path_factory.mktemp("caches")
    for seed in (0, 1):
        write_cache(place / str(seed), seed)
    return place


@pytest.fixture
def cache(caches, tmp_path):
    shutil.copytree(caches / "0", tmp_path / "cache")
    return tmp_path / "cache"


def use(folder):
    """Read every example of a cache."""
    for split in ("train", "held_out"):
        examples = TokenCache(folder).load_examples(split)
        examples.fetch(range(len(examples)), range(len(examples)))


def swap(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def write_tail(path, tail):
    """Replace the last 200 bytes of a file."""
    path.write_bytes(path.read_bytes()[:-200] + tail)


def resave(path, change):
    """Write a shard again as another tool does, without digests."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


CACHE_DAMAGE = {
    "flip": (lambda c: flip_byte(c / "train-00001.safetensors", -9), "the values of '.*' do not match their digest"),
    "zeros": (
        lambda c: write_tail(c / "train-00000.safetensors", bytes(200)),
        "do not match their digest",
    ),
    "cut": (
        lambda c: write_tail(c / "train-00000.safetensors", b""),
        "is damaged",
    ),
    "swapped": (
        lambda c: swap(c / "train-00000.safetensors", c / "train-00001.safetensors"),
        "train-00000.safetensors was written as train-00001.safetensors",
    ),
    "copied": (
        lambda c: shutil.copy(c / "train-00000.safetensors", c / "train-00001.safetensors"),
        "train-00001.safetensors was written as train-00000.safetensors",
    ),
    "bool": (
        lambda c: resave(c / "train-00000.safetensors", lambda t: t.update(tokens=t["tokens"] > 3)),
        r"'tokens' is bool 8, 2, 30 instead of int16 8, 2, 30",
    ),
    "float16": (
        lambda c: resave(c / "train-00000.safetensors", lambda t: t.update(tokens=t["tokens"].half())),
        "'tokens' is float16",
    ),
    "a lost view": (
        lambda c: resave(c / "train-00000.safetensors", lambda t: t.update(tokens=t["tokens"][:, :1])),
        r"'tokens' is int16 8, 1, 30 instead of int16 8, 2, 30",
    ),
    "labels lost": (
        lambda c: resave(c / "train-00000.safetensors", lambda t: t.pop("labels")),
        "holds tokens instead of tokens, labels",
    ),
    "a token beyond": (
        lambda c: resave(c / "train-00000.safetensors", lambda t: t["tokens"].view(-1)[5].fill_(32)),
        "tokens are .* to 32, not 0 to 31",
    ),
    "a label below": (
        lambda c: resave(c / "held_out-00000.safetensors", lambda t: t["labels"].view(-1)[1].fill_(-1)),
        "labels are -1 to 2, not 0 to 2",
    ),
    "an edited head": (
        lambda c: write_json(c / "cache.json", read_json(c / "cache.json") | {"class_names": ["a", "c", "b"]}),
        "cache.json does not match the digest",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_damaged_caches_are_named(damage, cache):
    spoil, words = CACHE_DAMAGE[damage]
    spoil(cache)
    line = refuse(lambda: use(cache), words)
    assert str(cache) in line
    assert "nextscale tokenize" in line


def test_a_shard_of_another_cache_is_refused(cache, caches):
    shutil.copy(caches / "1" / "train-00001.safetensors", cache)
    refuse(lambda: use(cache), "train-00001.safetensors was written for another folder, with other settings")
    refuse(lambda: verify(cache), "train-00001.safetensors was written for another folder")


def test_a_cache_of_an_earlier_version_is_read(cache):
    head = read_json(cache / "cache.json")
    del head["digest"]
    write_json(cache / "cache.json", head)
    before = TokenCache(cache).load_examples("train").tokens_NVL.clone()
    for path in cache.glob("*.safetensors"):
        save_file(load_file(path), path)
    use(cache)
    assert torch.equal(TokenCache(cache).load_examples("train").tokens_NVL, before)
    verify(cache)


def test_verify_reads_all_of_a_cache(cache, capsys):
    verify(cache)
    assert "5 files match their digests" in capsys.readouterr().out
    flip_byte(cache / "held_out-00000.safetensors", -3)
    flip_byte(cache / "train-00002.safetensors", -3)
    line = refuse(lambda: verify(cache), "2 damaged files in .*held_out-00000.safetensors is damaged: .*train-00002")
    assert "DAMAGED" in capsys.readouterr().out
    assert "train-00001" not in line


class _Images:
    """Images by number, for features."""

    where = "images"

    def __init__(self, count, seed=0):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def fetch(self, start, stop):
        return torch.arange(start, stop, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) + self.seed

    def identity(self):
        return {"seed": self.seed}


class _Network:
    name = "mean"

    def __call__(self, images):
        return Features(images.float().mean(dim=(2, 3)), None, images.float().amax(dim=(2, 3)))

    def fingerprint(self):
        return "0"


def extract(folder, seed=0):
    """Features of 11 images in shards of 4."""
    images, extraction = _Images(11, seed), Extraction([_Network()], shard=4, batch=4)
    record_extraction(images, extraction, folder)
    extract_features(images, extraction, folder)
    return read_features(folder, 11, extraction)


def test_damaged_features_are_named(tmp_path):
    features = extract(tmp_path / "a")
    assert features["mean.pool"][:, 0].tolist() == list(range(11))
    extract(tmp_path / "b", seed=9)
    first, second = tmp_path / "a" / "features-00000.safetensors", tmp_path / "a" / "features-00001.safetensors"
    for spoil, words in (
        (lambda: flip_byte(second, -2), "features-00001.safetensors is damaged: .* do not match their digest"),
        (lambda: swap(first, second), "features-00000.safetensors was written as features-00001"),
        (lambda: shutil.copy(tmp_path / "b" / first.name, first), "features-00000.safetensors was written for another"),
        (lambda: resave(second, lambda t: t.pop("mean.logits")), "holds content, mean.pool instead of content, mean.l"),
        (lambda: resave(second, lambda t: t.update({"mean.pool": t["mean.pool"].half()})), "'mean.pool' is float16"),
        (lambda: resave(second, lambda t: t.update({"mean.pool": t["mean.pool"][:3]})), "float32 3, 3 instead of"),
        (lambda: resave(first, lambda t: t.update(other=t.pop("mean.pool"))), "holds .*other.* instead of content"),
        (lambda: resave(second, lambda t: t["mean.pool"][0].fill_(float("nan"))), "'mean.pool' has values from nan"),
    ):
        kept = first.read_bytes(), second.read_bytes()
        spoil()
        line = refuse(lambda: extract(tmp_path / "a"), words)
        assert str(tmp_path / "a") in line
        first.write_bytes(kept[0])
        second.write_bytes(kept[1])
    assert torch.equal(extract(tmp_path / "a")["mean.pool"], features["mean.pool"])


def test_damaged_samples_are_named(tmp_path):
    config = tiny_config()
    record_settings(tmp_path / "samples.json", {"images": 70})
    owner = read_owner(tmp_path / "samples.json")
    for start, rows in ((0, 64), (64, 6)):
        path = _shard_path(tmp_path, start)
        tokens = torch.arange(rows * config.pyramid.length, dtype=torch.int32).view(rows, -1) % 32
        write_shard(path, path, {"tokens": tokens, "label": torch.arange(rows) % 5}, owner)
    data = _load_samples(tmp_path, 70, config)
    assert len(data.train) + len(data.held_out) == 70
    verify(tmp_path)
    path = _shard_path(tmp_path, 64)
    flip_byte(path, -1)
    refuse(lambda: _load_samples(tmp_path, 70, config), "samples-000064.safetensors is damaged: .*digest; delete it")
    resave(path, lambda t: None)  # the damaged token remains, the digest is lost
    refuse(lambda: _load_samples(tmp_path, 70, config), "tokens are .* to 31, not 0 to 31")
