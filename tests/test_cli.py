"""The command line as a user meets it: real processes for the contract, in-process calls for the many mistakes."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from nextscale.cli.commands import COMMANDS
from nextscale.cli.parser import main, parse
from nextscale.common.errors import UserError
from nextscale.config.files import read_settings
from nextscale.config.sampling import SampleConfig
from tests.conftest import FIXTURES, read_fixture

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> subprocess.CompletedProcess:
    """A process of its own."""
    command = [sys.executable, "-m", "nextscale.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def fails(capsys, *arguments: object) -> str:
    """The one line that a mistaken command prints."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("nextscale: error: ")
    return lines[0]


def test_the_contract_with_official_files(official, tmp_path, capsys):
    """import-official, sample and reconstruct, from the official implementation's files to its tokens and images.

    Each by a process of its own for the first of the models, in this one for the others.
    """

    def succeeds(*arguments: object) -> None:
        if official.folder.name == FIXTURES[0]:
            done = run(*arguments)
            assert done.returncode == 0, done.stderr
        else:
            assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err

    vae, var = official.files
    heads = ["--heads", official.meta["num_heads"]]
    succeeds("import-official", "--vae", vae, "--var", var, *heads, "--out", tmp_path / "model")
    meta, io = official.meta, official.io
    succeeds(
        "sample", tmp_path / "model", "--labels", ",".join(map(str, io["in.label"].tolist())), "--cfg", meta["cfg"],
        "--top-k", meta["top_k"], "--top-p", meta["top_p"], "--seed", meta["seed"], "--official-seeding",
        "--out", tmp_path / "grid.png", "--tokens-out", tmp_path / "T.safetensors", "--images-out", tmp_path / "images",
    )  # fmt: skip
    out = load_file(tmp_path / "T.safetensors")
    with safe_open(tmp_path / "T.safetensors", framework="pt") as file:
        assert file.metadata() == {"types": '{"dtype": "float32", "computed_in": "float32"}'}
    assert out["tokens"].dtype == torch.int64
    assert torch.equal(out["tokens"], io["out.seeded.tokens"])
    assert out["images"].dtype == torch.float32
    assert (out["images"] - io["out.seeded.image"]).abs().max() < 1e-4
    for path, image in zip(sorted((tmp_path / "images").iterdir()), out["images"], strict=True):
        written = np.asarray(Image.open(path)).transpose(2, 0, 1)
        np.testing.assert_allclose(written, image.numpy() * 255, atol=0.51)
    assert Image.open(tmp_path / "grid.png").mode == "RGB"
    if not (official.folder / "png.safetensors").exists():
        return
    succeeds(
        "reconstruct", tmp_path / "model", official.folder / "image0.png", official.folder / "image1.png",
        "--out", tmp_path / "grid.png", "--tokens-out", tmp_path / "R.safetensors",
    )  # fmt: skip
    expected, out = load_file(official.folder / "png.safetensors"), load_file(tmp_path / "R.safetensors")
    assert torch.equal(out["tokens"], expected["tokens"])
    assert (out["images"] * 2 - 1 - expected["reconstruction"]).abs().max() < 1e-4


def test_export_official(tmp_path):
    vae, var = read_fixture("var_tiny_l2").files
    assert main(["import-official", "--vae", str(vae), "--var", str(var), "--out", str(tmp_path / "m")]) == 0
    out = tmp_path / "v.pth", tmp_path / "w.safetensors"
    assert main(["export-official", str(tmp_path / "m"), "--vae", str(out[0]), "--var", str(out[1])]) == 0
    assert torch.load(out[0], weights_only=True).keys() == load_file(vae).keys()
    assert load_file(out[1]).keys() == load_file(var).keys()


def test_info(capsys):
    assert main(["info", "var-d16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 310_283_520
    assert main(["info", "var-d36"]) == 0
    assert "2,353,893,904 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: nextscale {name}" in text
    assert COMMANDS[name].__doc__.split(".")[0].split(":")[0][:30] in " ".join(text.split())


def test_overview_and_version(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    shown = {line[2:22].strip(): line[22:] for line in out.splitlines() if line.startswith("  ")}
    assert shown == {name: inspect.getdoc(kind).splitlines()[0] for name, kind in COMMANDS.items()}
    assert main(["--version"]) == 0


def test_mistakes_in_one_line(capsys, tiny_folder, tmp_path):
    out = ["--out", tmp_path / "x.png"]
    assert "did you mean 'sample'?" in fails(capsys, "smaple")
    assert "label 5 is out of range: this model has 5 classes, 0 to 4" in fails(
        capsys, "sample", tiny_folder, "--labels", "1,5", *out
    )
    assert "no class named 'cat'" in fails(capsys, "sample", tiny_folder, "--labels", "cat", *out)
    assert "has an empty entry" in fails(capsys, "sample", tiny_folder, "--labels", "1,,2", *out)
    assert "cfg must be 0 to 1000" in fails(capsys, "sample", tiny_folder, "--labels", "1", "--cfg", "-2", *out)
    assert "there is no checkpoint folder" in fails(capsys, "sample", tmp_path / "no", "--labels", "1", *out)
    assert "there is no image" in fails(capsys, "reconstruct", tiny_folder, tmp_path / "no.png", *out)
    assert "there is no file" in fails(capsys, "import-official", "--vae", "no.pth", "--out", tmp_path / "m")
    assert "device 'cuda:9' cannot be used here" in fails(
        capsys, "sample", tiny_folder, "--labels", "1", "--device", "cuda:9", *out
    )
    assert "nothing to write" in fails(capsys, "export-official", tiny_folder)
    assert "it is a folder" in fails(capsys, "sample", tiny_folder, "--labels", "1", "--out", tmp_path)
    assert not (tmp_path / "x.png").exists()


def test_unknown_option_names_the_nearest(tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(tiny_folder), "--labels", "1", "--cgf", "2", "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 2
    assert "--cfg" in capsys.readouterr().err


def test_a_bad_image_leaves_the_old_output(tiny_folder, tmp_path, capsys):
    (tmp_path / "grid.png").write_bytes(b"old")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    fails(capsys, "reconstruct", tiny_folder, tmp_path / "bad.png", "--out", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == b"old"


def test_config_file_and_overrides(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 5\ntransformer: {depth: 3}\ntrain_tokenizer: {learning_rate: 3e-4, steps: 7}\n")
    settings = parse(["quickstart", "--config", str(path), "--train-tokenizer.steps", "9"]).settings
    assert (settings.seed, settings.transformer.depth) == (5, 3)
    assert (settings.train_tokenizer.learning_rate, settings.train_tokenizer.steps) == (3e-4, 9)
    path.write_text("sede: 5\n")
    assert "has no setting 'sede'; did you mean 'seed'?" in fails(capsys, "quickstart", "--config", path)
    path.write_text("{")
    assert "is no YAML" in fails(capsys, "quickstart", "--config", path)
    with pytest.raises(UserError, match="cannot read config"):
        read_settings(SampleConfig, tmp_path / "absent.yaml")
    path.write_text("{cfg: 3, top_k: 5}")
    command = parse(["sample", "folder", "--labels", "1", "--out", "x.png", f"--config={path}", "--top-k", "7"])
    assert (command.settings, command.model) == (SampleConfig(cfg=3.0, top_k=7), "folder")


def test_a_traceback_never_reaches_the_user(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + bytes(7) + b"garbage")
    done = run("import-official", "--vae", tmp_path / "x.safetensors", "--out", tmp_path / "m")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "x.safetensors") in done.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "command", ["reconstruct {model} {image} --out {out}", "edit {model} {image} --mask {mask} --out {out}"]
)
def test_a_picture_smaller_than_the_model_is_enlarged_and_said_so(command, tiny_folder, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (5, 9), "teal").save(tmp_path / "small.png")
    Image.new("RGB", (5, 9), "white").save(tmp_path / "mask.png")
    names = {
        "model": tiny_folder,
        "image": tmp_path / "small.png",
        "mask": tmp_path / "mask.png",
        "out": tmp_path / "o.png",
    }
    assert main(command.format(**names).split()) == 0
    assert "small.png is 5 x 9, smaller than the model's 8 x 8; it is enlarged" in capsys.readouterr().out


def test_the_plain_backend_can_be_chosen(tiny_folder, tmp_path, monkeypatch):
    from nextscale import Pipeline

    loaded = []
    load = Pipeline.from_pretrained
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *a, **k: loaded.append(k["backend"]) or load(*a, **k))
    for options in ([], ["--backend", "plain"]):
        command = [
            "sample",
            str(tiny_folder),
            "--labels",
            "1",
            "--top-k",
            "1",
            "--out",
            str(tmp_path / "a.png"),
            *options,
        ]
        assert main(command) == 0
    assert loaded == ["auto", "plain"]


@dataclass
class ShowBar:
    """Fails, or is interrupted, while a progress bar is shown."""

    error: str

    def run(self) -> None:
        self.bar = tqdm(total=2, desc="working")
        self.bar.update()
        raise {"user": UserError("stop"), "interrupt": KeyboardInterrupt(), "defect": ValueError("stop")}[self.error]


@pytest.mark.parametrize("error", ["user", "interrupt", "defect"])
def test_an_error_begins_on_a_line_of_its_own(error, capsys, monkeypatch):
    """The progress bar ends before the message."""
    monkeypatch.setitem(COMMANDS, "show-bar", ShowBar)
    assert main(["show-bar", "--error", error]) in (1, 2, 130)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert lines[-1].startswith("nextscale: "), lines
    assert any("working:  50%" in line for line in lines[:-1])


@pytest.mark.parametrize("option", ["--lora", "--prompt", "--control"])
def test_an_option_of_several_values_is_given_once(option, capsys):
    """The first values were dropped without a word."""
    assert main(["sample", "model", option, "a", option, "b", "--out", "grid.png"]) == 2
    assert f"{option} is given 2 times: give it once, with all values behind it" in capsys.readouterr().err
