"""Training of adapters by `nextscale train`: what is trained and stored, resuming, the best model, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextscale.cli.parser import main
from nextscale.config.log import read_log
from nextscale.config.transformer import ConditionConfig, ExpertsConfig
from nextscale.pipeline import Pipeline
from nextscale.training.open_run import keep_best_model
from tests.conftest import randomised, tiny_config

CONFIG = {
    "lora": {"rank": 2, "keep": 12},
    "images": {"held_out": 0.25, "flip": True},
    "train": {"steps": 6, "batch_size": 6, "save_every": 2, "log_every": 1, "warmup_steps": 1, "learning_rate": 0.05},
    "sampling": {"cfg": 1.0},
}


def draw_pictures(folder, names, count=8):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with pictures of a new class, a model with named classes and settings, as the working directory."""
    pipeline = randomised(tiny_config(condition=ConditionConfig(num_classes=3)))
    checkpoint = pipeline.to_checkpoint()
    names = ("dog", "ship", "car")
    checkpoint.config = type(checkpoint.config)(
        checkpoint.config.pyramid, checkpoint.config.tokenizer, checkpoint.config.transformer, names
    )
    Pipeline.from_checkpoint(checkpoint).save_pretrained(tmp_path / "model")
    draw_pictures(tmp_path / "photos", ["my-cat"])
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str) -> int:
    return main(text.split())


TRAIN = "train c.json --start model --data photos --device cpu --out"


def test_a_run_leaves_an_adapter_and_resumes_bit_for_bit(place, capsys):
    assert run(f"{TRAIN} whole") == 0
    said = capsys.readouterr().out
    assert "trained are adapters of rank 2 in 8 layers and the new classes my-cat" in said
    assert "have no gradient" not in said
    shutil.copytree(place / "whole", place / "resumed")  # as if it had been stopped after step 4
    for file in (place / "resumed" / "training").glob("transformer-00000006.*"):
        file.unlink()
    (place / "resumed" / "finished.json").unlink()
    (place / "resumed" / "lora.safetensors").unlink()
    assert run("resume resumed --device cpu") == 0
    ours, theirs = (load_file(place / name / "lora.safetensors") for name in ("whole", "resumed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    state = torch.load(place / "whole" / "training" / "transformer-00000006.pt", weights_only=True)
    assert state["module"].keys() == ours.keys(), "the model itself is not stored again"
    assert not (place / "whole" / "tokenizer.safetensors").exists()
    assert run("sample model --lora whole --labels my-cat,dog --out grid.png") == 0
    assert Pipeline.from_pretrained("model", lora=["whole"]).config.class_names == ("dog", "ship", "car", "my-cat")


def test_embeddings_of_new_classes_alone_leave_the_others_as_they_are(place):
    assert run(f"{TRAIN} row --lora.rank 0 --lora.classes-only --lora.classes my-cat=dog") == 0
    weights = load_file(place / "row" / "lora.safetensors")
    assert list(weights) == ["condition.embedding.new_rows"]
    before, after = Pipeline.from_pretrained("model"), Pipeline.from_pretrained("model", lora=["row"])
    rows = before.to_checkpoint().transformer["condition.embedding.weight"]
    moved = (weights["condition.embedding.new_rows"][0] - rows[0]).abs().max()
    assert 0 < moved < 1, "it starts from the row of dog"
    assert torch.equal(before.sample(["dog", None], cfg=1.5).tensor, after.sample(["dog", None], cfg=1.5).tensor)


def test_a_run_stops_at_its_best_loss_and_keeps_it(place, capsys):
    """Without a learning rate the held-out loss stays as it is: the first one is the lowest."""
    still = "--train.learning-rate 0 --train.final-learning-rate 0 --lora.keep 0"
    assert run(f"{TRAIN} run --train.patience 2 --train.steps 40 {still}") == 0
    losses = {r["step"]: r["validation_loss"] for r in read_log(place / "run" / "log.jsonl") if "validation_loss" in r}
    best = min(losses, key=losses.get)
    assert (best, max(losses)) == (2, 6)
    assert f"stopped at step {max(losses)}: the held-out loss has not fallen since step {best}" in (
        said := capsys.readouterr().out
    )
    assert f"held-out cross-entropy {losses[best]:.3f}" in said
    (place / "run" / "finished.json").unlink()
    assert run("resume run --device cpu") == 0
    assert max(r["step"] for r in read_log(place / "run" / "log.jsonl")) == 6, "it ends again where it did"
    (place / "run" / "best" / "config.json").write_text("the best")
    keep_best_model(place / "run")
    assert (place / "run" / "config.json").read_text() == "the best"
    assert (place / "run" / "training").is_dir()


def test_classes_of_the_model_and_new_ones_are_trained_together(place):
    draw_pictures(place / "photos", ["ship"])
    assert run(f"{TRAIN} run --train.precision bfloat16 --train.ema 0.5 --train.micro-batch 2") == 0
    samples = load_file(place / "run" / "model-samples.safetensors")
    assert samples["tokens"].shape == (12, 30)
    assert set(samples["label"].tolist()) == {0, 1, 2, 4}, "the model's classes and no label, which follows the new one"
    assert Pipeline.from_pretrained("model", lora=["run"]).config.class_names[3:] == ("my-cat",)


def test_what_cannot_be_trained_is_refused(place, capsys):
    def refuse(command, text):
        assert run(command) == 2
        assert text in capsys.readouterr().err

    refuse(f"{TRAIN} a --lora.rank 0 --lora.classes-only --data model-less", "model-less")
    refuse(f"{TRAIN} a --lora.classes my-dog=dog", "lora.classes names my-dog, which is no new class")
    refuse(f"{TRAIN} a --loss.encoder x", "trained without semantic guidance")
    refuse(f"{TRAIN} a --lora.classes-only", "classes-only goes with rank 0")
    refuse("train c.json --tokenizer model --data photos --out a", "give that model with --start")
    shutil.rmtree(place / "photos" / "my-cat")
    draw_pictures(place / "photos", ["ship"])
    refuse(f"{TRAIN} a --lora.rank 0 --lora.classes-only", "trains the embeddings of new classes, and photos has none")
    assert not (place / "a").exists()


def test_a_run_names_the_model_that_has_changed(place, capsys):
    assert run(f"{TRAIN} run") == 0
    (place / "run" / "finished.json").unlink()
    randomised(tiny_config(condition=ConditionConfig(num_classes=3)), seed=3).save_pretrained(place / "model")
    assert run(f"{TRAIN} run") == 2
    assert "the weights of model have changed" in capsys.readouterr().err


def test_experts_get_adapters_of_their_own(place):
    experts = ExpertsConfig(router="stmoe", count=4, active=2)
    randomised(tiny_config(experts=experts)).save_pretrained(place / "model")
    assert run(f"{TRAIN} run --lora.layers ffn") == 0
    weights = load_file(place / "run" / "lora.safetensors")
    shapes = {name: tuple(t.shape) for name, t in weights.items() if name.startswith("blocks.0.")}
    assert shapes == {
        "blocks.0.ffn.experts.fc1.lora_A": (4, 2, 32), "blocks.0.ffn.experts.fc1.lora_B": (4, 128, 2),
        "blocks.0.ffn.experts.fc2.lora_A": (4, 2, 128), "blocks.0.ffn.experts.fc2.lora_B": (4, 32, 2),
    }  # fmt: skip
