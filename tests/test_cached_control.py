"""Token caches hold control pictures: those that are computed from the images, of every view."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.data import DataConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import TokenCache
from nextscale.data.datasets import open_dataset
from nextscale.data.examples import BatchDataset, load_batches
from nextscale.training.components import load_components
from nextscale.training.transformer import TransformerTask
from nextscale.transformer.conditions.picture import compute_control
from tests.conftest import randomised, tiny_config

EDGES = ConditionConfig("picture", control="edges", patch=3, layers=0)
SMALL = replace(EDGES, control="low-resolution")
TEXT = ConditionConfig("text", max_tokens=4, layers=0)
CROSS = ("attention", "cross-attention")
IMAGES = DataConfig(held_out=0.25, flip=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of 6 pixels, of which eight are no multiple, 12 pictures with captions, and two caches."""
    folder = tmp_path_factory.mktemp("control")
    randomised(tiny_config("1,2,3")).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "photos" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(str(i))
    assert tokenize(folder, "both", "--control", "edges", "low-resolution") == 0
    assert tokenize(folder, "edges", "--control", "edges") == 0
    return folder


def tokenize(folder, out, *options):
    words = ["tokenize", folder / "photos", "--tokenizer", folder / "model", "--out", folder / out, "--captions"]
    words += ["--images.held-out", "0.25", "--images.flip", "--views", "2", "--shard", "5", *options]
    return main(list(map(str, words)))


def test_every_view_has_the_control_picture_of_its_pixels(folder):
    train, held_out, _ = open_dataset(str(folder / "photos"), 6, IMAGES, 0, captioned=True)
    cache = TokenCache(folder / "both")
    for split, part, views in (("train", train, 2), ("held_out", held_out, 1)):
        cached = cache.load_examples(split)
        for epoch in range(views + 1):
            rows, seen = list(range(len(part))), []
            positions = [epoch * len(part) + i for i in rows] if views > 1 else None
            batch = cached.fetch(rows, positions)
            for i in rows:
                view = (epoch + i) % views
                seen.append(part.fetch([i], [view * len(part) + i] if views > 1 else None)["image"])
            for kind in ("edges", "low-resolution"):
                expected = compute_control(torch.cat(seen), kind)
                assert torch.equal(batch[kind], expected)
                assert len({picture.sum().item() for picture in expected}) > 2
    here, there = (list(load_batches(BatchDataset(cached, 0, "train"), [(0, 3)], workers, False)) for workers in (0, 1))
    assert torch.equal(here[0]["edges"], there[0]["edges"])


def load(folder, data, condition):
    transformer = tiny_config("1,2,3", condition=condition, mixers=CROSS).transformer
    config = RunConfig(data=str(folder / data), transformer=transformer, images=IMAGES, tokenizer=str(folder / "model"))
    return load_components(config, World())


@pytest.mark.parametrize("kind", ["edges", "combined"])
def test_a_model_learns_the_same_from_a_cache_and_from_images(folder, kind):
    parts = {"edges": EDGES, "small": SMALL, "words": TEXT}
    condition = EDGES if kind == "edges" else ConditionConfig("combined", parts=parts)
    losses, gradients = [], []
    for data in ("photos", "edges" if kind == "edges" else "both"):
        components = load(folder, data, condition)
        task = TransformerTask(components.transformer, components.tokenizer, components.examples, RunConfig().train)
        batch = components.held_out.fetch(range(3), None)
        loss, _ = task({name: value for name, value in batch.items() if name != "unreadable"}, {}, 0)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in components.transformer.condition.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert max(float(one.abs().max()) for one in gradients[0]) > 0


def test_what_a_cache_lacks_is_named_before_training(folder, capsys):
    both = ConditionConfig("combined", parts={"edges": EDGES, "small": SMALL})
    message = "edges is a token cache without low-resolution, which the model reads: make it again with `nextscale "
    with pytest.raises(UserError, match=message + "tokenize --control edges low-resolution`, or train on the images"):
        load(folder, "edges", both)
    assert tokenize(folder, "edges", "--control", "low-resolution") == 2
    assert "other settings (control was {'kinds': ['edges'], 'size': [6, 6]}, now {" in capsys.readouterr().err
    assert tokenize(folder, "edges") == 2
    assert "size': [6, 6]}, now None" in capsys.readouterr().err
    assert tokenize(folder, "edges", "--control", "edges", "edges") == 2
    assert "control must not name a kind twice" in capsys.readouterr().err
    assert tokenize(folder, "edges", "--control", "edges") == 0
    assert "complete already" in capsys.readouterr().out
