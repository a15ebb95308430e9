"""The check of models that draw letters from captions: what it reads, and its report on a small model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import letterforms, letterforms_check
from examples.letter_captions import COLOURS, STYLE
from examples.letterforms import LETTERS, colour, draw_letters
from examples.letterforms_check import measure, read_colours
from nextscale.common.pictures import to_uint8
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.condition import ConditionConfig
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_colours_of_noisy_letters_are_read():
    rng = np.random.default_rng(0)
    pictures = draw_letters(FONTS / "DejaVuSans.ttf")
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    for start in range(0, 52, 13):  # each letter in 30 pairs would take long
        drawn = np.stack([colour(pictures[(start + i) % 52], *pair) for i, pair in enumerate(pairs)]).astype(float)
        noisy = (drawn + rng.normal(0, 12, drawn.shape)).clip(0, 255).astype(np.uint8)
        inks, papers = read_colours(noisy)
        assert list(zip(inks, papers, strict=True)) == pairs


def test_shares_are_those_of_what_is_asked():
    asked = {
        "letter": ["A", "b", "C", "d"], "ink": ["red", "red", "blue", "blue"], "paper": ["white"] * 4,
        "weight": ["bold", None, "light", None], "slant": ["upright"] * 4, "face": [None] * 4,
    }  # fmt: skip
    found = {
        "ink": ["red", "red", "blue", "red"], "paper": ["white", "white", "white", "white"],
        "letter": ["A", "b", "x", "d"], "weight": ["light", "light", "light", "bold"], "face": ["serif"] * 4,
    }  # fmt: skip
    assert measure(found, asked) == {
        "letter": 0.75, "ink": 0.75, "paper": 1.0, "weight": 0.5, "letter and colours": 0.5, "all": 0.25,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Held-out letters, a small model that reads captions, and classifiers of letters and of weight."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "fonts").mkdir()
    for name in ("DejaVuSans.ttf", "DejaVuSerif-BoldItalic.ttf"):
        (folder / "fonts" / name).symlink_to(FONTS / name)
    with pytest.MonkeyPatch.context() as patch:
        words = ["letterforms", str(folder / "fonts"), "--out", str(folder / "x"), "--captions"]
        patch.setattr("sys.argv", [*words, "--hold-out-share", "0.3"])
        letterforms.main()
    condition = ConditionConfig("text", max_tokens=64)
    for seed, name in enumerate(("model", "bag")):
        config = tiny_config(condition=condition, mixers=("attention", "cross-attention"))
        randomised(config, seed).save_pretrained(folder / name)
    torch.manual_seed(0)
    for name, words in {"letter": tuple(LETTERS), "weight": STYLE["weight"]}.items():
        Classifier(ClassifierConfig(8, (8,), 4, mirror=False), words).save(folder / name)
    Classifier(ClassifierConfig(8, (8,), 4), tuple(LETTERS)).save(folder / "mirror")
    return folder


def run(monkeypatch, folder, *words, prompts="x-held-out.parquet", letters="letter"):
    command = ["check", str(folder / "model"), "--prompts", str(folder / prompts), "--letters", str(folder / letters)]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu", *map(str, words)])
    letterforms_check.main()


def test_a_report_says_what_is_read_in_the_samples_of_each_condition(folder, tmp_path, monkeypatch, capsys):
    from pyarrow import parquet

    words = ["--limit", 20, "--seed", 3, "--cfg", 1.0, "--weight", folder / "weight", "--bag-of-words", folder / "bag"]
    run(monkeypatch, folder, *words, "--out", tmp_path / "a")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert "20 prompts" in capsys.readouterr().out
    shares = report["shares"]
    assert [*shares] == ["samples", "bag of words", "file", "shuffled", "chance"]
    assert {tuple(part) for part in shares.values()} == {
        ("letter", "ink", "paper", "weight", "letter and colours", "all")
    }
    assert shares["file"]["ink"] == shares["file"]["paper"] == 1
    assert shares["chance"]["all"] == pytest.approx(1 / 52 / 30 / 3)
    assert [shares["chance"][part] for part in ("ink", "paper", "weight")] == pytest.approx([1 / 6, 1 / 6, 1 / 3])
    assert (tmp_path / "a" / "prompts.png").stat().st_size > 1000

    rows, _ = letterforms_check.read_prompts(folder / "x-held-out.parquet", 20, 3)
    assert len({str(row) for row in rows}) == 20
    assert all(row in parquet.read_table(folder / "x-held-out.parquet").to_pylist() for row in rows)
    letter, weight = (load_classifier(folder / name) for name in ("letter", "weight"))
    for name, column, condition in (("model", "caption", "samples"), ("bag", "bag", "bag of words")):
        model = Pipeline.from_pretrained(folder / name, device="cpu")
        images = to_uint8(model.sample(prompts=[row[column] for row in rows], cfg=1.0, seed=3).tensor)
        for part, reader, wanted in (
            ("letter", letter, [LETTERS[row["label"]] for row in rows]),
            ("weight", weight, [row["weight"] for row in rows]),
        ):
            seen = [reader.class_names[int(reader(image[None]).logits_BC.argmax())] for image in images]
            right = sum(a == b for a, b in zip(seen, wanted, strict=True)) / 20
            assert shares[condition][part] == pytest.approx(right)
        if condition == "samples":
            inks, _ = read_colours(images.permute(0, 2, 3, 1).numpy())
            other = [rows[(i + 1) % 20]["ink"] for i in range(20)]
            assert shares["shuffled"]["ink"] == pytest.approx(np.mean(np.array(inks) == other))

    run(monkeypatch, folder, *words, "--batch-size", 7, "--out", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "report.json").read_text())["shares"] == shares


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ((), {"letters": "mirror"}, "reads mirror images too: train it with --classifier.no-mirror"),
        ((), {"letters": "weight"}, r"reads other classes \(light, regular, bold, ...\) than the words of letter"),
        ((), {"prompts": "x-test.txt"}, "cannot read .*x-test.txt"),
        ((), {"prompts": "none.parquet"}, "cannot read .*none.parquet"),
        (("--face", "weight"), {}, "than the words of face"),
    ],
)
def test_what_cannot_be_checked_is_refused(folder, tmp_path, monkeypatch, words, changes, message):
    words = [folder / word if word == "weight" else word for word in words]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(monkeypatch, folder, "--out", tmp_path / "out", *words, **changes)
    assert not (tmp_path / "out").exists()


def test_letters_without_captions_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["letterforms", str(folder / "fonts"), "--out", str(tmp_path / "grey")])
    letterforms.main()
    with pytest.raises(SystemExit, match=r"has no columns bag, caption, face, ink, .*letterforms --captions"):
        run(monkeypatch, folder, "--out", tmp_path / "out", prompts=tmp_path / "grey-train.parquet")
