"""examples/control_check.py: its measures against loops, and a whole check of a small model."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from examples import control_check
from nextscale.cli.parser import main
from nextscale.transformer.conditions.picture import compute_control


def find_share(these, those, reach):
    """The share of edge pixels of these pictures that have one of those within so many rows and columns."""
    found = []
    for picture, other in zip(these, those, strict=True):
        for y, x in np.argwhere(picture[0] > 0):
            near = other[0, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
            found.append(bool((near > 0).any()))
    return np.mean(found)


def test_edges_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    drawn, given = ((torch.rand(3, 1, 9, 7, generator=generator) < share).byte() * 255 for share in (0.1, 0.2))
    for reach, figure in enumerate(control_check.compare_edges(drawn, given).values()):
        precision, recall = (
            find_share(drawn.numpy(), given.numpy(), reach),
            find_share(given.numpy(), drawn.numpy(), reach),
        )
        assert figure == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-5)
    assert [*control_check.compare_edges(given, given).values()] == [1, 1]
    assert [*control_check.compare_edges(torch.zeros_like(given), given).values()] == [0, 0]


def test_low_resolution_against_numpy():
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    given = compute_control(images.flip(0), "low-resolution")
    blocks = images.numpy().reshape(2, 3, 2, 4, 2, 4).mean(axis=(3, 5)).round()
    error = (blocks - blocks[::-1]) ** 2
    expected = np.mean([10 * np.log10(255**2 / error[i].mean()) for i in range(2)])
    figure = control_check.measure(images, given, "low-resolution")["low resolution, PSNR in dB"]
    assert figure == pytest.approx(expected, abs=0.05)


def test_a_model_is_checked(tiny_folder, tmp_path, monkeypatch, capsys):
    for name in ("0", "1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((8, 8), 100).save(tmp_path / "data" / name / f"{i}.png")
    main(["adapt", str(tiny_folder), "--control", "edges", "--out", str(tmp_path / "edges")])
    options = [
        "--cfg",
        "0",
        "--data",
        tmp_path / "data",
        "--without",
        tiny_folder,
        "--limit",
        "4",
        "--out",
        tmp_path / "check",
    ]
    monkeypatch.setattr(sys, "argv", ["control_check", *map(str, [tmp_path / "edges", *options])])
    control_check.main()
    report = json.loads((tmp_path / "check" / "report.json").read_text())
    figures = report["figures"]
    assert (report["control"], report["images"]) == ("edges", 4)
    assert figures["samples"] == figures["no control"] == figures["without"], "it was not trained"
    assert figures["reconstructed"] != figures["samples"] != figures["other control"]
    assert Image.open(tmp_path / "check" / "control.png").mode == "RGB"
    assert "edges within a pixel, F1" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["control_check", *map(str, [tiny_folder, *options])])
    with pytest.raises(SystemExit, match="reads no edges and no low resolution"):
        control_check.main()
