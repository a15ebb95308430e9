"""An encoder that learns without labels: its views, its loss, its queue, its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.encoder import EncoderRunConfig, MocoConfig, ViewConfig
from nextscale.config.files import read_settings
from nextscale.config.log import read_log
from nextscale.data.datasets import load_images
from nextscale.encoders.load import load_encoder
from nextscale.encoders.self_supervised import SmallEncoder
from nextscale.evaluation.metrics.neighbours import knn_accuracy, knn_classes
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.training.encoder import evaluate_encoder
from nextscale.training.engine.loop import train
from nextscale.training.moco import Moco, info_nce
from nextscale.training.views import DRAWS, change_colours, crop_images, make_view
from tests.test_train import SETTINGS, encoder_task

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vote(sample, bank, labels, neighbours, temperature):
    """The class that the weighted vote gives one sample, by loops."""
    cosines = [float(sample @ row / np.linalg.norm(sample) / np.linalg.norm(row)) for row in bank]
    votes: dict[int, float] = {}
    for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:neighbours]:
        votes[labels[i]] = votes.get(labels[i], 0.0) + np.exp(cosines[i] / temperature)
    return max(votes, key=lambda c: votes[c])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(2, 6), st.integers(1, 25), st.integers(0, 99))
def test_knn_against_loops(samples, bank, width, neighbours, seed):
    rng = np.random.default_rng(seed)
    x, y, labels = rng.normal(size=(samples, width)), rng.normal(size=(bank, width)), rng.integers(4, size=bank)
    found = knn_classes(torch.tensor(x), torch.tensor(y), torch.tensor(labels), neighbours, 0.5)
    assert found.tolist() == [vote(row, y, labels.tolist(), neighbours, 0.5) for row in x]
    truth = torch.tensor(rng.integers(4, size=samples))
    right = [vote(row, y, labels.tolist(), 20, 0.07) == t for row, t in zip(x, truth.tolist(), strict=True)]
    assert knn_accuracy(torch.tensor(x), truth, torch.tensor(y), torch.tensor(labels)) == pytest.approx(np.mean(right))


def test_info_nce_against_numpy():
    query, key, queue = (RNG.normal(size=(n, 6)) for n in (5, 5, 9))
    loss, accuracy = info_nce(*(torch.tensor(x) for x in (query, key, queue)), temperature=0.3)
    terms, nearest = [], 0
    for q, k in zip(query, key, strict=True):
        own, others = q @ k / 0.3, queue @ q / 0.3
        terms.append(-np.log(np.exp(own) / (np.exp(own) + np.exp(others).sum())))
        nearest += own > others.max()
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-9)
    assert float(accuracy) == pytest.approx(nearest / 5)


def tiny_moco(queue: int = 7) -> Moco:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    return Moco(encoder_task(images).moco.query.encoder, MocoConfig(queue, 0.9, 0.2, 16, 8))


def test_keys_enter_the_queue_in_order_and_the_key_branch_follows():
    moco = tiny_moco(queue=7)
    before, batches = moco.queue_QD.clone(), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    keys = [moco.key(b).clone() for b in batches]
    for part in batches[0].split([1, 3]):  # two micro-batches of a step
        moco(part, part)
    assert torch.equal(moco.queue_QD, before), "a loss is told from the queue as it was before the step"
    moco.update(World())
    assert torch.allclose(moco.queue_QD, torch.cat([keys[0], before[4:]]), atol=1e-6)
    slow, fast = (branch.head[0].weight for branch in (moco.key, moco.query))
    with torch.no_grad():
        fast.add_(1.0)
    expected = 0.9 * slow + 0.1 * fast
    moco(batches[1], batches[1])
    moco.update(World())
    ring = torch.cat([keys[1][3:], keys[0][1:4], keys[1][:3]])
    assert torch.allclose(moco.queue_QD, ring, atol=1e-6)
    assert int(moco.next) == 1
    assert torch.allclose(slow, expected, atol=1e-6)
    assert not any(p.requires_grad for p in moco.key.parameters())


def test_micro_batches_change_rounding_alone(tmp_path):
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ends = []
    for micro in (0, 2):
        task = encoder_task(images)
        train(task, replace(SETTINGS, steps=3, micro_batch=micro), tmp_path / str(micro))
        ends.append(task.trained.state_dict())
    for name, tensor in ends[0].items():
        assert torch.allclose(ends[1][name].double(), tensor.double(), atol=2e-5), name


def bilinear(image_3HW, top, left, height, width, mirrored):
    """The part of an image resized to the whole, by loops; places outside are those at the border."""
    out, (H, W) = np.zeros_like(image_3HW), image_3HW.shape[1:]
    for y in range(H):
        for x in range(W):
            column = W - 1 - x if mirrored else x
            r = np.clip(top * H + (y + 0.5) * height - 0.5, 0, H - 1)
            c = np.clip(left * W + (column + 0.5) * width - 0.5, 0, W - 1)
            r0, c0 = int(r), int(c)
            r1, c1, fr, fc = min(r0 + 1, H - 1), min(c0 + 1, W - 1), r - r0, c - c0
            rows = image_3HW[:, [r0, r1]] * np.array([1 - fr, fr])[:, None]
            out[:, y, x] = (rows.sum(1)[:, [c0, c1]] * np.array([1 - fc, fc])).sum(1)
    return out


def test_cuts_against_loops():
    images, draws, config = torch.rand(4, 3, 6, 8), torch.rand(4, 5), ViewConfig(smallest_crop=0.3)
    found = crop_images(images, draws, config)
    for image, (area, aspect, row, column, flip), result in zip(images, draws.tolist(), found, strict=True):
        area, ratio = 0.3 + 0.7 * area, (4 / 3) ** (2 * aspect - 1)
        height, width = min(1, (area / ratio) ** 0.5), min(1, (area * ratio) ** 0.5)
        expected = bilinear(image.numpy(), row * (1 - height), column * (1 - width), height, width, flip < 0.5)
        assert np.allclose(result.numpy(), expected, atol=1e-5)
    whole = torch.tensor([[0.3, 0.5, 0.1, 0.9, 0.7]]).expand(4, 5)
    assert torch.allclose(crop_images(images, whole, ViewConfig(smallest_crop=1.0)), images, atol=1e-5)


def test_colours_against_steps_one_by_one():
    """Brightness, contrast, saturation and hue each by its own definition, with no value near the ends of the range."""
    config = ViewConfig(jitter=0.3, hue=0.1, jitter_share=0.6, grey_share=0.3)
    images, draws = 0.4 + 0.2 * torch.rand(12, 3, 4, 4, dtype=torch.float64), torch.rand(12, 6, dtype=torch.float64)
    draws[:, 0], draws[:, 5] = torch.tensor([0.1, 0.9] * 6), torch.tensor([0.1, 0.1, 0.9, 0.9] * 3)  # every case
    found, luma = change_colours(images, draws, config).numpy(), np.array([0.299, 0.587, 0.114])
    to_yiq = np.array([luma, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    for image, (change, b, c, s, h, grey), result in zip(images.numpy(), draws.tolist(), found, strict=True):
        x = image.copy()
        if change < 0.6:
            b, c, s = (1 + 0.3 * (2 * u - 1) for u in (b, c, s))
            x = x * b
            x = x * c + (1 - c) * np.tensordot(luma, x, 1).mean()
            x = x * s + (1 - s) * np.tensordot(luma, x, 1)
            yiq = np.tensordot(to_yiq, x, 1)
            chroma = (yiq[1] + 1j * yiq[2]) * np.exp(2j * np.pi * 0.1 * (2 * h - 1))
            x = np.tensordot(np.linalg.inv(to_yiq), np.stack([yiq[0], chroma.real, chroma.imag]), 1)
        if grey < 0.3:
            x = np.broadcast_to(np.tensordot(luma, x, 1), x.shape)
        assert np.allclose(result, x, atol=1e-4)


def test_a_view_does_not_depend_on_its_batch():
    images, draws = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), torch.rand(5, DRAWS)
    views = make_view(images, draws, ViewConfig())
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert -1 <= views.min() < views.max() <= 1
    for i in range(5):
        assert torch.allclose(make_view(images[i : i + 1], draws[i : i + 1], ViewConfig())[0], views[i], atol=1e-6)


CONFIG = (
    "encoder: {image_size: 16, widths: [16, 32], blocks: [0, 1], groups: 8}\n"
    "views: {smallest_crop: 0.4, flip: false, hue: 0.0}\nmoco: {queue: 512, hidden: 64, key_width: 32}\n"
    "images: {held_out: 0.2}\nbank: 1000\n"
    "train: {steps: 60, batch_size: 64, learning_rate: 1.0e-3, warmup_steps: 5, ema: 0.8, save_every: 40, log_every: 1}"
)


def test_training_learns_and_resumes_to_the_same_weights(tmp_path, capsys):
    """Through the command line, on digits: own keys are told from 512 others, and k-NN knows the classes."""
    config, folders = tmp_path / "config.yaml", {n: tmp_path / n for n in ("whole", "cut", "random")}
    config.write_text(CONFIG)
    command = ["encoder", "train", str(config), "--data", "digits", "--device", "cpu"]
    assert main([*command, "--out", str(folders["random"]), "--untrained"]) == 0
    assert main([*command, "--out", str(folders["whole"])]) == 0
    accuracy = [float(t.split("accuracy ")[1][:-1]) for t in capsys.readouterr().out.splitlines() if "done" in t]
    assert min(accuracy) > 60, "percent; chance is 10"
    last = [r for r in read_log(folders["whole"] / "log.jsonl") if "loss" in r][-10:]
    assert np.mean([r["loss"] for r in last]) < np.log(513) - 0.2, "guessing among 512 keys and one's own"
    assert np.mean([r["own_key_nearest"] for r in last]) > 10 / 513
    assert (folders["whole"] / "curves.png").exists()
    kinds = {name: load_encoder(str(folders[name])).kind for name in ("whole", "random")}
    assert kinds == {"whole": "moco_v2", "random": "untrained"}

    (folders["cut"] / "training").mkdir(parents=True)
    (folders["cut"] / "run.json").write_bytes((folders["whole"] / "run.json").read_bytes())
    for file in (folders["whole"] / "training").glob("encoder-00000040*"):
        (folders["cut"] / "training" / file.name).write_bytes(file.read_bytes())
    assert main([*command, "--out", str(folders["cut"])]) == 0
    whole, cut_short = ((folders[n] / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert cut_short == whole

    capsys.readouterr()
    assert main([*command, "--out", str(folders["whole"]), "--untrained"]) == 2
    assert "untrained was False, now True" in capsys.readouterr().err


def test_evaluation_is_the_vote_over_mean_features(tmp_path):
    task = encoder_task(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    task.moco.query.encoder.save(tmp_path / "encoder")
    report = evaluate_encoder(str(tmp_path / "encoder"), "digits", "digits", 0, tmp_path / "report.json")
    images = load_images("digits", 16)
    encoder = load_encoder(str(tmp_path / "encoder"))
    feature = encoder(scale_to_unit(images.images_B3HW), (4, 4)).mean(dim=(1, 2))
    expected = float((knn_classes(feature, feature, images.labels_B) == images.labels_B).double().mean())
    assert report["knn_accuracy"] == pytest.approx(expected, abs=2e-3)
    assert json.loads((tmp_path / "report.json").read_text()) == add_digest(report)
    assert (report["neighbours"], report["temperature"]) == (20, 0.07)
    for name in ("cat", "owl"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "0.png")
    with pytest.raises(UserError, match="only .*data has cat, owl; only digits has 0, 1, 2"):
        evaluate_encoder(str(tmp_path / "encoder"), "digits", str(tmp_path / "data"), 0, None)


def test_pictures_without_classes_are_trained_on_and_not_measured(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(6):
        noise = RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = ["encoder", "train", str(tmp_path / "config.yaml"), "--data", str(tmp_path / "photos"), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--train.steps", "2", "--train.batch-size", "4"]
    assert main(command) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert load_encoder(str(tmp_path / "out")).steps == 2


@pytest.mark.parametrize("recipe", ["encoder-cifar10", "encoder-digits"])
def test_recipes_make_maps_that_fit_a_small_generator(recipe):
    config = read_settings(EncoderRunConfig, Path(recipe))
    encoder = SmallEncoder(config.encoder)
    assert encoder.patch == 4
    assert encoder.width <= 128
    assert sum(p.numel() for p in encoder.parameters()) <= 2**19, "2 MB"


def test_settings_that_cannot_work_are_named():
    with pytest.raises(UserError, match="queue must hold a batch .64. at least; got queue=32"):
        EncoderRunConfig(moco=MocoConfig(queue=32))
    with pytest.raises(UserError, match="temperature must be above 0"):
        MocoConfig(temperature=0)
    with pytest.raises(UserError, match="smallest_crop must lie between 0 and 1"):
        ViewConfig(smallest_crop=0)
