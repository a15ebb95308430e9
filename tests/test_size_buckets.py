"""Training at several sizes: batches of one size, shapes, token caches, validation and left-out scales."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.checkpoints.native import read_checkpoint, read_config
from nextscale.checkpoints.official import export_official
from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.lora import LoraConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import (
    MVAR_MIXERS,
    ConditionConfig,
    ExpertsConfig,
    MambaConfig,
    PositionConfig,
    TransformerConfig,
)
from nextscale.config.transformer_training import LossConfig, RunConfig, SizesConfig
from nextscale.data.examples import BatchDataset, MemoryExamples
from nextscale.data.images import load_image, read_size
from nextscale.data.sizes import SizedExamples, join_sizes, keep_nearest, name_pyramids
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.sampling.likelihood import compute_log_likelihood
from nextscale.training.components import _check_sizes
from nextscale.training.lengths import LENGTH, choose_length
from nextscale.training.transformer import TransformerTask
from nextscale.training.validation import validate
from tests.conftest import randomised, tiny_config

OWN, WIDE, SMALL = Pyramid.parse("1,2,3,4"), Pyramid.parse("1,2x3,4x6"), Pyramid.parse("1,2")


def make_examples(count, pyramid, start=0):
    tokens = torch.arange(start, start + count)[:, None].repeat(1, pyramid.length) % 32
    return MemoryExamples(tokens=tokens, label=torch.arange(count) % 5, number=torch.arange(start, start + count))


@pytest.mark.parametrize("counts", [(7, 3, 20), (4, 8), (1, 5)])
def test_each_batch_has_one_size_and_an_epoch_has_every_example(counts):
    batch, starts = 4, np.cumsum([0, *counts])
    parts = [make_examples(n, OWN, int(start)) for n, start in zip(counts, starts, strict=False)]
    examples = SizedExamples(parts, [str(i) for i in range(len(counts))], batch=batch)
    assert len(examples) == sum(-(-n // batch) * batch for n in counts)
    dataset, orders = BatchDataset(examples, 0, "test"), []
    for epoch in range(2):
        seen = []
        for step in range(len(examples) // batch):
            first = epoch * len(examples) + step * batch
            found = dataset[first, first + batch]
            halves = [dataset[first + i, first + i + 2] for i in (0, 2)]  # of two processes
            assert torch.equal(torch.cat([half["number"] for half in halves]), found["number"])
            numbers, (size,) = found["number"].tolist(), found["size"].unique().tolist()
            assert all(starts[size] <= number < starts[size + 1] for number in numbers)
            seen += numbers
        assert {*seen} == {*range(sum(counts))}
        orders.append(seen)
    assert orders[0] != orders[1] or sum(counts) < 8


def test_positions_are_those_of_the_part():
    """A crop is drawn from the position: another one in each epoch, the same for every batch that has the example."""
    seen = []

    class Recording(MemoryExamples):
        def fetch(self, indices, positions):
            seen.extend(zip(indices, positions, strict=True))
            return super().fetch(indices, positions)

    examples = SizedExamples([Recording(label=torch.arange(3)), Recording(label=torch.arange(2))], ["a", "b"], batch=2)
    dataset = BatchDataset(examples, 0, "test")
    for start in range(0, 3 * len(examples), 2):
        dataset[start, start + 2]
    assert {p % 3 == i or p % 2 == i for i, p in seen} == {True}
    assert max(p for _, p in seen) == 8, "three epochs of three examples"


def test_images_belong_to_the_nearest_shape():
    rng, sizes = random.Random(0), [(8, 8), (16, 16), (8, 12), (12, 8)]
    shapes = torch.tensor([[rng.randrange(1, 500), rng.randrange(1, 500)] for _ in range(200)])
    kept = {size: keep_nearest(size, sizes)(shapes) for size in sizes}
    assert torch.equal(kept[8, 8], kept[16, 16])
    assert torch.equal(kept[8, 8].int() + kept[8, 12].int() + kept[12, 8].int(), torch.ones(200).int())
    for (width, height), *found in zip(shapes.tolist(), *(kept[size].tolist() for size in sizes), strict=True):
        distance = {size: abs(np.log(height / width) - np.log(size[0] / size[1])) for size in sizes}
        assert [distance[size] == min(distance.values()) for size in sizes] == found
    assert keep_nearest((8, 8), [(8, 8), (16, 16)]) is None


def test_shapes_are_read_from_headers_as_images_are_turned(tmp_path):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
        assert read_size(tmp_path / "x.jpg") == load_image(tmp_path / "x.jpg").size
    (tmp_path / "x.jpg").write_bytes(b"no image")
    assert read_size(tmp_path / "x.jpg") == (1, 1)


def test_names_of_sizes():
    assert name_pyramids([OWN, WIDE]) == ["4x4", "4x6"]
    assert name_pyramids([OWN, Pyramid.parse("1,4")]) == ["4x4-4", "4x4-2"]
    assert name_pyramids([OWN, Pyramid.parse("1,1,1,4")]) == ["1_2_3_4", "1_1_1_4"]


# ---- the task


def create_task(pyramids, sizes, **settings):
    pipeline = randomised(tiny_config("1,2,3,4", **settings))
    parts = [make_examples(8, pyramid) for pyramid in pyramids]
    examples, held_out = join_sizes(parts, parts, pyramids, OWN, 4)
    return TransformerTask(
        pipeline.transformer, pipeline.tokenizer, examples, TrainConfig(batch_size=4), LossConfig(), sizes=sizes
    ), held_out  # fmt: skip


FAMILIES = {
    "table": {},
    "rotary": {"positions": PositionConfig("rotary", size_embedding=True)},
    "mixture": {"experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    "expert-choice": {"experts": ExpertsConfig(router="expert-choice", count=4, active=2)},
    "mvar": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(head_width=16)},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_validation_measures_every_size_as_a_model_of_that_size_would(family):
    pyramids = (WIDE, OWN, SMALL)
    task, held_out = create_task(pyramids, SizesConfig(("1,2", "1,2x3,4x6")), **FAMILIES[family])
    assert task.pyramids == pyramids
    measured, means = validate(task, held_out, 100, World()), []
    for pyramid, name in zip(pyramids, ("4x6", "4x4", "2x2"), strict=True):
        tokens = make_examples(8, pyramid).tensors["tokens"]
        inputs = task.frozen.tokenizer.at(pyramid).teacher_inputs(tokens)
        logits = task.model.at(pyramid)(torch.arange(8) % 5, inputs).logits_BNV
        nats = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        means.append(nats.mean().item())
        assert measured[f"validation_loss_at_{name}"] == pytest.approx(means[-1], rel=1e-5)
        per_scale = [nats[:, i:j].mean().item() for i, j in pyramid.spans]
        assert measured[f"validation_loss_at_{name}_per_scale"] == pytest.approx(per_scale, rel=1e-4)
    assert measured["validation_loss"] == pytest.approx(np.mean(means), rel=1e-5)
    assert measured["validation_loss_per_scale"] == measured["validation_loss_at_4x4_per_scale"]


def test_steps_that_leave_out_scales_have_the_loss_of_the_first_ones():
    task, _ = create_task((OWN,), SizesConfig(drop=0.5))
    batch = task.examples.fetch(range(4), range(4))
    noise = {"drop": torch.zeros(4, dtype=torch.bool)}
    whole = task(batch, noise | {LENGTH: torch.full((4,), 0.9)}, 0)[1]
    assert len(whole["loss_per_scale"]) == 4
    for draw, length in ((0.0, 2), (0.49, 3)):
        loss, scalars = task(batch, noise | {LENGTH: torch.full((4,), draw)}, 0)
        torch.testing.assert_close(scalars["loss_per_scale"], whole["loss_per_scale"][:length], atol=1e-5, rtol=1e-5)
        counts = torch.tensor(OWN.counts[:length])
        expected = (whole["loss_per_scale"][:length] * counts).sum() / counts.sum()
        torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scalars[f"cross_entropy_to_{length}x{length}"], expected, atol=1e-5, rtol=1e-5)
        loss.backward()
        late = task.model.pos_embed.grad[:, OWN.spans[length - 1][1] :]
        assert not late.any(), "positions that are left out get no gradient"
        task.model.zero_grad()
    assert set(task(batch, {}, 0)[1]) >= {"cross_entropy_to_2x2", "cross_entropy_to_3x3"}


def test_lengths_are_drawn_evenly():
    config, draws = (
        SizesConfig(drop=0.6, lengths=(2, 4, 9)),
        torch.rand(6000, generator=torch.Generator().manual_seed(0)),
    )
    found = [choose_length(config, 6, float(draw)) for draw in draws]
    shares = [found.count(length) / 6000 for length in (2, 4, 6)]
    assert shares == pytest.approx([0.3, 0.3, 0.4], abs=0.03)


def test_what_sizes_cannot_do_is_refused():
    for settings, message in (
        ({"scales": ("1,2", "1,2")}, "must be different"),
        ({"scales": ("4",)}, "of two scales each"),
        ({"drop": 0.5, "lengths": (1,)}, "lengths must be"),
    ):
        with pytest.raises(UserError, match=message):
            SizesConfig(**settings)
    with pytest.raises(UserError, match="the model's own scales"):
        SizesConfig(("1,2,3,4",)).list_pyramids(OWN)
    with pytest.raises(UserError, match="no scale can be left out"):
        create_task((OWN,), SizesConfig(drop=0.5, lengths=(4,)))
    config = RunConfig(sizes=SizesConfig(("1,2",)))
    picture = TransformerConfig(condition=ConditionConfig("picture"))
    with pytest.raises(UserError, match="control pictures have one size"):
        _check_sizes(config, picture)
    with pytest.raises(UserError, match="at their model's own size"):
        RunConfig(data="x", start="y", sizes=SizesConfig(("1,2",)), lora=LoraConfig(rank=2)).complete()


# ---- the commands


@pytest.fixture(scope="module")
def cached(tmp_path_factory, request):
    """Images of two shapes, a tokenizer, and a token cache of three sizes."""
    folder = tmp_path_factory.mktemp("buckets")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / "photos" / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, [(20, 20, 3), (20, 30, 3)][i // 2 % 2], dtype=np.uint8)).save(path)
    randomised(tiny_config("1,2,3,4")).save_pretrained(folder / "model")
    arguments = ["tokenize", folder / "photos", "--tokenizer", folder / "model", "--out", folder / "cache"]
    assert main([str(a) for a in [*arguments, "--sizes", "1,2", "1,2x3,4x6", "--images.held-out", "0.3"]]) == 0
    return folder


def run_train(folder, out, *options):
    model = ["--transformer.depth", "1", "--transformer.width", "16", "--transformer.heads", "2"]
    train = ["--train.batch-size", "4", "--train.log-every", "1", "--train.save-every", "3", "--train.steps", "6"]
    data = ["--data", folder / "cache", "--tokenizer", folder / "model", "--train.micro-batch", "0"]
    (folder / "empty.yaml").write_text("{}\n")
    arguments = ["train", folder / "empty.yaml", *data, "--out", out, *model, *train, *options]
    return main([str(a) for a in arguments])


def test_a_run_at_several_sizes_resumes_to_the_same_weights_and_samples_between_them(cached, tmp_path, capsys):
    heads = [
        json.loads((cached / "cache" / name / "cache.json").read_text())
        for name in (".", "sizes/1_2", "sizes/1_2x3_4x6")
    ]
    assert [head["scales"] for head in heads] == ["1,2,3,4", "1,2", "1,2x3,4x6"]
    squares, small, wide = (sum(head["examples"].values()) for head in heads)
    assert squares == small == wide == 12, "images of each shape"
    sizes = ["--sizes.scales", "1,2", "1,2x3,4x6", "--sizes.drop", "0.5", "--transformer.positions.kind", "rotary"]
    sizes += ["--transformer.positions.size-embedding", "--train.precision", "bfloat16"]
    assert run_train(cached, tmp_path / "whole", *sizes) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for path in (tmp_path / "parts" / "training").glob("*00000006*"):
        path.unlink()
    (tmp_path / "parts" / "finished.json").unlink()
    assert run_train(cached, tmp_path / "parts", *sizes) == 0
    whole, parts = (Pipeline.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert whole.config.sizes == parts.config.sizes == (WIDE, SMALL)
    state = parts.transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.transformer.state_dict().items())
    log = read_log(tmp_path / "whole" / "log.jsonl")
    trained = {name for record in log for name in record if name.startswith("cross_entropy_at")}
    assert trained <= {f"cross_entropy_at_{name}" for name in ("4x4", "4x6", "2x2")}
    assert {f"validation_loss_at_{name}" for name in ("4x4", "4x6", "2x2")} <= {
        name for record in log for name in record
    }
    for size in ((8, 8), (4, 4), (8, 12), (6, 6)):
        assert whole.at(size=size).sample(["cat"]).tensor.shape == (1, 3, *size)
    assert read_config(tmp_path / "whole")[0].sizes == (WIDE, SMALL)
    tokens = whole.at("1,2").sample(["cat"]).tokens
    inputs = whole.at("1,2").tokenizer.teacher_inputs(tokens)
    logits = whole.at("1,2").transformer(torch.tensor([0]), inputs).logits_BNV.log_softmax(-1)
    nats = compute_log_likelihood(whole.at("1,2").tokenizer, whole.at("1,2").transformer, tokens, torch.tensor([0]))
    torch.testing.assert_close(nats.sum(), logits.gather(-1, tokens[..., None]).sum(), atol=1e-4, rtol=1e-4)
    assert "by size (the figure above is their mean): 4x6" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "whole")]) == 0
    assert "also trained at      scales 1,2x3,4x6 and 1,2" in capsys.readouterr().out


def test_a_model_is_fine_tuned_on_images_of_several_sizes_and_exported(cached, tmp_path):
    (cached / "empty.yaml").write_text("{}\n")
    train = ["--train.batch-size", "4", "--train.steps", "2", "--images.held-out", "0.3", "--images.random-crop"]
    adapted = ["adapt", cached / "model", "--classes", "cat,dog", "--out", tmp_path / "adapted"]
    assert main([str(a) for a in adapted]) == 0
    arguments = ["train", cached / "empty.yaml", "--start", tmp_path / "adapted", "--data", cached / "photos"]
    arguments = [*arguments, *train, "--sizes.scales", "1,2x3,4x6", "--out", tmp_path / "run"]
    assert main([str(a) for a in arguments]) == 0
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint.config.sizes == (WIDE,)
    notes = export_official(checkpoint, None, tmp_path / "var.pth")
    assert any("other scales that it was trained at are left out: 1,2x3,4x6" in note for note in notes)


def test_a_cache_without_the_size_is_named(cached, tmp_path, capsys):
    assert run_train(cached, tmp_path / "run", "--sizes.scales", "1,3") == 2
    assert "has no tokens at scales 1,3: `nextscale tokenize --sizes` adds them" in capsys.readouterr().err
