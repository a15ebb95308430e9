"""The native folder: what is saved comes back, and nothing is lost when something goes wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextscale.checkpoints.native import read_config
from nextscale.common.errors import UserError
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config


def test_save_and_load(tmp_path):
    config = tiny_config("1,2x1,3x4")
    pipeline = randomised(config)
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model")
    assert again.config == config
    for ours, theirs in ((pipeline.tokenizer, again.tokenizer), (pipeline.transformer, again.transformer)):
        theirs = theirs.state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in ours.state_dict().items())
    assert torch.equal(pipeline.sample([1, 2]).tensor, again.sample([1, 2]).tensor)


def test_class_names_are_kept_and_understood(tmp_path):
    from dataclasses import replace

    config = replace(tiny_config(), class_names=("ant", "bee", "cat", "dog", "emu"))
    randomised(config).save_pretrained(tmp_path)
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert pipeline.sample(["cat", 0, None]).captions == ("cat", "ant", "no label")
    with pytest.raises(UserError, match="no class named 'dgo'; did you mean 'dog'"):
        pipeline.sample(["dgo"])


def test_trained_weights_are_not_rounded_to_the_stored_type(tiny_folder, tmp_path):
    """A tensor goes back to bf16 only where that loses nothing."""
    pipeline = Pipeline.from_pretrained(tiny_folder, dtype="bfloat16")
    pipeline.save_pretrained(tmp_path / "half")
    full = Pipeline.from_pretrained(tmp_path / "half")
    with torch.no_grad():
        full.transformer.head.weight[0, 0] = 1 + 2**-20
    full.save_pretrained(tmp_path / "mixed")
    stored = load_file(tmp_path / "mixed" / "transformer.safetensors")
    assert stored["head.weight"].dtype == torch.float32
    assert stored["head.weight"][0, 0] == 1 + 2**-20
    assert stored["word_embed.weight"].dtype == torch.bfloat16


def test_tokenizer_alone(tiny_folder, tmp_path):
    pipeline = Pipeline.from_pretrained(tiny_folder)
    from dataclasses import replace

    alone = Pipeline(replace(pipeline.config, transformer=None), pipeline.tokenizer, None)
    alone.save_pretrained(tmp_path / "alone")
    again = Pipeline.from_pretrained(tmp_path / "alone")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.reconstruct(images).tensor, pipeline.reconstruct(images).tensor)
    with pytest.raises(UserError, match="a tokenizer alone"):
        again.sample([1])


@pytest.fixture
def copy(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def spoil_config(folder, **changes):
    head = json.loads((folder / "config.json").read_text())
    head |= changes
    (folder / "config.json").write_text(json.dumps(head))


def test_damaged_folders_are_named(copy, tmp_path):
    cases = [
        (lambda: spoil_config(copy, version=3), r"format version 3, this nextscale reads up to 2.*pip install -U"),
        (lambda: spoil_config(copy, format="other"), r"was not written by nextscale"),
        (lambda: (copy / "config.json").write_text("{"), r"cannot read .*config\.json"),
        (lambda: (copy / "transformer.safetensors").write_bytes(b"junk"), r"transformer\.safetensors is damaged"),
        (lambda: (copy / "transformer.safetensors").unlink(), r"there is no .*transformer\.safetensors"),
        (lambda: (copy / "config.json").unlink(), r"is no nextscale checkpoint: it has no config\.json"),
    ]
    for spoil, message in cases:
        fresh = {f.name: f.read_bytes() for f in copy.iterdir()}
        spoil()
        with pytest.raises(UserError, match=message):
            Pipeline.from_pretrained(copy)
        for name, data in fresh.items():
            (copy / name).write_bytes(data)
    with pytest.raises(UserError, match="there is no checkpoint folder"):
        Pipeline.from_pretrained(tmp_path / "nowhere")


def test_wrong_tensors_are_named(copy):
    tensors = load_file(copy / "transformer.safetensors")
    for change, message in (
        (lambda t: t.pop("head.bias"), r"missing tensor 'head.bias' \(32,\)"),
        (lambda t: t.update(gate=torch.zeros(1)), r"unknown tensor 'gate' \(1,\)"),
        (lambda t: t.update({"head.bias": torch.zeros(3)}), r"'head.bias' has shape \(3,\) instead of \(32,\)"),
    ):
        spoiled = dict(tensors)
        change(spoiled)
        save_file(spoiled, copy / "transformer.safetensors")
        with pytest.raises(UserError, match=r"transformer\.safetensors does not fit its model: .*" + message):
            Pipeline.from_pretrained(copy)


def test_unknown_key_in_config_names_the_nearest(copy):
    head = json.loads((copy / "config.json").read_text())
    head["model"]["transformer"]["detph"] = 3
    (copy / "config.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match=r"transformer has no setting 'detph'; did you mean 'depth'"):
        read_config(copy)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits of POSIX")
@pytest.mark.parametrize("limit", [2_000, 30_000])
def test_a_full_disk_leaves_the_old_checkpoint_whole(limit, copy):
    """The system refuses to write past a file size: the save fails, and every old file is as it was."""
    before = {f.name: f.read_bytes() for f in copy.iterdir()}
    code = f"""
import resource, sys
from nextscale.pipeline import Pipeline
from nextscale.common.errors import UserError
pipeline = Pipeline.from_pretrained({str(copy)!r})
pipeline.transformer.head.bias.data += 1
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    pipeline.save_pretrained({str(copy)!r})
except UserError as error:
    assert "cannot write" in str(error) and "unchanged" in str(error), error
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    assert {f.name: f.read_bytes() for f in copy.iterdir()} == before


def test_saving_over_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="it is a file, not a folder"):
        tiny.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_hub_upload_and_download_go_through_the_hub_library(tiny, tmp_path, monkeypatch):
    """What is handed to huggingface_hub is a folder that loads; what comes from it is read as one."""
    import huggingface_hub

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            shutil.copytree(folder_path, tmp_path / "hub")
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tiny.push_to_hub("model", token="secret") == "https://example.org/me/model"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub"))
    again = Pipeline.from_pretrained("me/model")
    assert torch.equal(again.sample([1]).tensor, tiny.sample([1]).tensor)


def test_a_name_that_is_neither_folder_nor_on_the_hub(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="there is no folder me/nothing, and the hub gave no model .*: no network$"):
        Pipeline.from_pretrained("me/nothing")
