"""The classifier whose features measure small images: its augmentation, training, evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.data.datasets import load_images
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.training.classifier import evaluate_classifier, shift_images


def test_moved_images_against_padding_and_cutting():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 8, 10), generator=rng, dtype=torch.uint8)
    shift = torch.randint(7, (6, 2), generator=rng)
    found = shift_images(images, shift, 3)
    for image, (row, column), result in zip(images, shift.tolist(), found, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (3, 3), (3, 3)), mode="reflect")
        assert np.array_equal(result.numpy(), padded[:, row : row + 8, column : column + 10])
    assert torch.equal(shift_images(images, torch.full((6, 2), 3), 3), images), "the middle is the image itself"


def test_training_learns_digits_and_goes_on_to_the_same_weights(tmp_path, capsys):
    """Through the command line: above 60 % in seconds; half the steps and then the rest give the same weights."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "classifier: {image_size: 16, widths: [16, 32], groups: 8}\nshift: 1\nimages: {held_out: 0.2}\n"
        "train: {steps: 60, batch_size: 64, learning_rate: 4.0e-3, warmup_steps: 5, save_every: 30, ema: 0.8}\n"
    )
    command = ["classifier", "train", str(config), "--data", "digits", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    report = capsys.readouterr().out
    assert "held-out accuracy" in report
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    accuracy = [r["validation_accuracy"] for r in log if "validation_accuracy" in r]
    assert accuracy[-1] > 0.6, "chance is 0.1"
    assert (tmp_path / "whole" / "curves.png").exists()

    cut = tmp_path / "cut"
    (cut / "training").mkdir(parents=True)
    (cut / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
    state = "classifier-00000030.pt"
    for file in (tmp_path / "whole" / "training").glob(f"{state.removesuffix('.pt')}*"):
        (cut / "training" / file.name).write_bytes(file.read_bytes())
    assert main([*command, "--out", str(cut)]) == 0
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (cut / "model.safetensors").read_bytes() == whole

    capsys.readouterr()
    assert main(["classifier", "evaluate", str(cut), "--data", "digits", "--out", str(tmp_path / "r.json")]) == 0
    assert "1797 images: accuracy" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    images = load_images("digits", 16)
    right = (load_classifier(cut)(images.images_B3HW).logits_BC.argmax(1) == images.labels_B).double().mean()
    assert found["accuracy"] == pytest.approx(float(right), abs=1e-6)


def test_other_classes_are_refused(tmp_path):
    Classifier(ClassifierConfig(16, (16,), 8), ("cat", "dog")).save(tmp_path / "model")
    for name in ("cat", "owl"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "0.png")
    with pytest.raises(UserError, match=r"only .*data has owl; only .*model has dog"):
        evaluate_classifier(tmp_path / "model", str(tmp_path / "data"), None)
