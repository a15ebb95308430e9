"""Damaged files: every one is named in one line, and none gives another result in silence."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.official_files import read_tensors
from nextscale.checkpoints.verify import accept_changes, verify
from nextscale.cli.parser import main
from nextscale.common import digest
from nextscale.common.digest import compute_digest
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.encoder import EncoderConfig
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.encoders.self_supervised import SmallEncoder, load_small_encoder
from nextscale.evaluation.compute import compute_metrics
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config


def flip_byte(path, position):
    """Invert one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_a_flipped_byte_of_a_pth_file_names_the_member(tmp_path):
    path = tmp_path / "x.pth"
    tensor = torch.arange(1000, dtype=torch.float32)
    torch.save({"a": tensor}, path)
    flip_byte(path, path.read_bytes().index(tensor.numpy().tobytes()) + 2000)
    with pytest.raises(UserError, match=r"x.pth is damaged: '.*data/0' in the archive.*CRC-32"):
        read_tensors(path, "")


def test_a_pth_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_tensors(tmp_path / "x.pth", "")["a"].tolist() == [0, 1, 2]


@pytest.fixture
def copy(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def refuse(action, match):
    """The one line of the UserError that `action` raises, which must match."""
    with pytest.raises(UserError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.safetensors", "transformer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "zeros", "float16", "another model"])
def test_changed_weights_do_not_load(damage, file, copy):
    path = copy / file
    if damage == "flip":
        flip_byte(path, -1001)
    elif damage == "zeros":
        content = path.read_bytes()
        path.write_bytes(content[:-5000] + bytes(5000))
    else:
        tensors = load_file(path)
        name = max(tensors, key=lambda n: tensors[n].numel())
        tensors[name] = tensors[name].half() if damage == "float16" else tensors[name].flip(0)
        save_file(tensors, path)
    for action in (lambda: Pipeline.from_pretrained(copy), lambda: read_checkpoint(copy), lambda: verify(copy)):
        line = refuse(action, rf"{file} does not match its digest in config.json: it is damaged, or another tool")
        assert "--accept-changes" in line
    accept_changes(copy)
    Pipeline.from_pretrained(copy)
    verify(copy)


def test_an_edited_config_is_refused_until_it_is_accepted(copy, capsys):
    head = json.loads((copy / "config.json").read_text())
    head["model"]["tokenizer"]["phi_ratio"] = 0.25
    (copy / "config.json").write_text(json.dumps(head))
    refuse(lambda: Pipeline.from_pretrained(copy), r"config.json does not match the digest .*--accept-changes")
    assert main(["info", str(copy), "--accept-changes"]) == 0
    assert Pipeline.from_pretrained(copy).config.tokenizer.phi_ratio == 0.25
    assert main(["info", str(copy), "--verify"]) == 0
    assert "3 files match their digests" in capsys.readouterr().out


def test_a_folder_of_an_earlier_version_loads_and_its_values_are_checked(copy):
    head = json.loads((copy / "config.json").read_text())
    del head["digests"], head["digest"]
    (copy / "config.json").write_text(json.dumps(head))
    Pipeline.from_pretrained(copy)
    tensors = load_file(copy / "tokenizer.safetensors")
    for value in (float("nan"), float("-inf"), 1e30):
        spoiled = {n: t.clone() for n, t in tensors.items()}
        spoiled["decoder.conv_out.bias"][1] = value
        save_file(spoiled, copy / "tokenizer.safetensors")
        refuse(lambda: Pipeline.from_pretrained(copy), r"tokenizer.safetensors is damaged: .*'decoder.conv_out.bias'")


def test_a_file_that_changes_after_it_was_verified_is_verified_again(copy, monkeypatch):
    path = copy / "transformer.safetensors"
    before = path.stat()
    Pipeline.from_pretrained(copy)
    assert not any(before.st_ino in file for file in digest._verified), "its times are too young to tell"
    monkeypatch.setattr(digest, "_SETTLED", -1)
    Pipeline.from_pretrained(copy)
    assert sum(before.st_ino in file for file in digest._verified) == 1
    flip_byte(path, -1001)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    refuse(lambda: Pipeline.from_pretrained(copy), "transformer.safetensors does not match its digest")
    flip_byte(path, -1001)
    Pipeline.from_pretrained(copy)
    head = json.loads((copy / "config.json").read_text())
    head["digests"][path.name] = "crc32:00000000"
    (copy / "config.json").write_text(json.dumps(digest.add_digest({k: v for k, v in head.items() if k != "digest"})))
    refuse(lambda: Pipeline.from_pretrained(copy), "transformer.safetensors does not match its digest")


def test_a_file_that_was_verified_is_not_read_again(copy, monkeypatch):
    """Its content is the one that this process read, by what the file system says, so a look at it costs nothing."""
    monkeypatch.setattr(digest, "_SETTLED", -1)
    Pipeline.from_pretrained(copy)
    seen = []
    monkeypatch.setattr(digest, "compute_digest", lambda tensors: seen.append(tensors) or compute_digest(tensors))
    Pipeline.from_pretrained(copy)
    assert not seen
    read_checkpoint(copy)
    assert len(seen) == 2, "a command that reads everything verifies everything"


def test_large_files_are_verified_by_commands_that_read_them_whole(copy, monkeypatch):
    monkeypatch.setattr(digest, "SMALL", 1000)
    flip_byte(copy / "transformer.safetensors", -1001)
    Pipeline.from_pretrained(copy)
    refuse(lambda: read_checkpoint(copy), "transformer.safetensors does not match its digest")
    refuse(lambda: verify(copy), "1 damaged files in .*transformer.safetensors does not match its digest")


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_changed_feature_networks_do_not_load(kind, tmp_path):
    if kind == "classifier":
        module = Classifier(ClassifierConfig(image_size=8, widths=(16,)), ("a", "b"))
    else:
        module = SmallEncoder(EncoderConfig(image_size=8, widths=(16,), blocks=(1,)))
    module.save(tmp_path)
    load = {"classifier": load_classifier, "encoder": load_small_encoder}[kind]
    load(tmp_path)
    head = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(head | {"class_names": ["b", "a"], "steps": 7}))
    refuse(lambda: load(tmp_path), "config.json does not match the digest")
    (tmp_path / "config.json").write_text(json.dumps(head))
    flip_byte(tmp_path / "model.safetensors", -10)
    refuse(lambda: load(tmp_path), "model.safetensors does not match its digest")


@pytest.mark.parametrize("official_seeding", [False, True])
def test_weights_that_are_not_finite_are_named_by_what_they_spoil(official_seeding):
    pipeline = randomised(tiny_config(), backend="plain")
    images = torch.rand(2, 3, 8, 8)
    parameters = dict(pipeline.tokenizer.named_parameters()) | dict(pipeline.transformer.named_parameters())

    def sample():
        return pipeline.sample([1, 2], seed=3, official_seeding=official_seeding)

    for name, words, actions in (
        ("decoder.conv_out.bias", "the decoder's images", [sample, lambda: pipeline.reconstruct(images)]),
        ("encoder.conv_in.weight", "the encoder's features", [lambda: pipeline.encode(images)]),
        ("head.weight", "the model's logits", [sample, lambda: pipeline.score(images, [1, 2])]),
    ):
        for value in (float("nan"), float("inf")):
            kept = parameters[name].data.clone()
            parameters[name].data.view(-1)[0] = value
            for action in actions:
                refuse(action, f"{words} are not finite: (the tokenizer's|its) weights are damaged")
            parameters[name].data.copy_(kept)
    sample()


def test_a_classifier_that_is_not_finite_measures_nothing(tmp_path, capsys):
    model = Classifier(ClassifierConfig(image_size=8, widths=(16,)), ("0", "1"))
    model.head.bias.data[0] = float("nan")
    model.save(tmp_path / "classifier")  # its digest is right
    for name in ("0", "1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "x.png")
    assert main(["classifier", "evaluate", str(tmp_path / "classifier"), "--data", str(tmp_path / "data")]) == 2
    assert "the classifier's cross-entropy is nan; its weights are damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"features \(logits\) are not finite"):
        compute_metrics("classifier", {"logits": torch.tensor([[0.0, float("nan")]])}, "x", None, 1, 3)


CONFIG_BOUNDS = [
    ("tokenizer.res_blocks", 10**6, "res_blocks must be 1 to 100"),
    ("tokenizer.res_blocks", 90, "model.tokenizer.res_blocks is 90, but tokenizer.safetensors holds 1"),
    ("tokenizer.num_phi", 900, "model.tokenizer.num_phi is 900, but tokenizer.safetensors holds 4"),
    ("tokenizer.vocab_size", 2**24, "tokenizer.safetensors does not fit its model: misshapen tensor"),
    ("transformer.depth", 900, "model.transformer.depth is 900, but transformer.safetensors holds 2"),
    ("transformer.depth", 10**9, "depth must be 1 to 1000"),
    ("transformer.width", 2**20, "transformer.safetensors does not fit its model: misshapen tensor"),
    ("transformer.condition.num_classes", 2**24, "transformer.safetensors does not fit its model: misshapen tensor"),
    ("pyramid", [[1, 1], [4000, 4000]], "model.pyramid has 16000001 tokens, but transformer.safetensors holds 30"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), CONFIG_BOUNDS)
def test_a_config_that_asks_for_more_than_the_weights_hold(key, value, words, copy):
    head = json.loads((copy / "config.json").read_text())
    *tables, last = key.split(".")
    place = head["model"]
    for table in tables:
        place = place[table]
    place[last] = value
    head.pop("digest")
    (copy / "config.json").write_text(json.dumps(head))
    began = time.monotonic()
    refuse(lambda: Pipeline.from_pretrained(copy), words)
    assert time.monotonic() - began < 5


def test_encoders_take_no_memory_for_a_forged_width(tmp_path):
    Classifier(ClassifierConfig(image_size=8, widths=(16,)), ("a", "b")).save(tmp_path)
    head = json.loads((tmp_path / "config.json").read_text())
    head["classifier"]["widths"] = [65536]
    (tmp_path / "config.json").write_text(json.dumps(head))
    refuse(lambda: load_classifier(tmp_path), "model.safetensors does not fit its model: misshapen tensor")


def test_a_new_model_beyond_the_memory_is_refused():
    config = tiny_config(width=2**20, heads=1, depth=1000)
    refuse(lambda: Pipeline.from_config(config), "would need .* GiB, and this machine has")


def test_the_models_of_the_repository_match_their_digests(capsys):
    models = Path(__file__).parents[1] / "models"
    verify(models)
    *lines, total = capsys.readouterr().out.splitlines()
    matching = {line.removesuffix(": matches its digest") for line in lines}
    needed = {str(path) for pattern in ("*/config.json", "*/*.safetensors") for path in models.glob(pattern)}
    assert len(needed) == 14
    assert needed <= matching
    assert total == f"{models}: {len(lines)} files match their digests"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_a_digest_depends_on_names_dtypes_shapes_and_every_byte(dtype):
    tensors = {"b": torch.ones(4, 3).to(dtype), "a": torch.zeros(()).to(dtype), "none": torch.zeros(0, 2).to(dtype)}
    found = compute_digest(tensors)
    assert compute_digest(dict(reversed(tensors.items()))) == found
    assert compute_digest(tensors | {"b": tensors["b"].T.contiguous().T}) == found, "the layout in memory is no content"
    for other in (
        tensors | {"b": tensors["b"].reshape(3, 4)},
        tensors | {"b": torch.cat([tensors["b"][:3], tensors["a"].expand(1, 3)])},
        tensors | {"a": tensors["a"].to(torch.float64)},
        {"c" if name == "b" else name: tensor for name, tensor in tensors.items()},
    ):
        assert compute_digest(other) != found
    assert compute_digest(tensors, "another place") != found
