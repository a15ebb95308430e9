"""What earlier versions wrote can still be read: checkpoints of format version 1, and records of runs."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from nextscale.checkpoints.native import VERSION, read_checkpoint, read_config
from nextscale.checkpoints.router_fingerprint import check_router_fingerprint, compute_router_fingerprint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.reading import read_json
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.encoder import EncoderRunConfig
from nextscale.config.files import read_settings, record_settings
from nextscale.config.migrate import migrate_record, rename_settings
from nextscale.config.parse import to_dict
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.tokenizer_training import TokenizerRunConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.training.engine.state import check_settings
from tests.test_dynamic import dynamic_pipeline


def to_version_1(settings: dict) -> dict:
    """The settings as version 1 wrote them."""
    if not isinstance(settings, dict):
        return settings
    out = {name: to_version_1(value) for name, value in settings.items()}
    if "late_ffn" in out:
        out["own"], out["identity"] = out.pop("late_ffn"), out.pop("router_fingerprint")
    for name in ("feed_forward", "options", "backend"):
        out.pop(name, None)
    return out


def compute_identity(weights, depth, text, late):
    """The checksum of version 1: of all biases and every 61st row of the weights, in bfloat16, without names."""
    digest = hashlib.sha256(text.encode())
    for block in range(depth):
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            tensor = weights[f"blocks.{block}.ffn{'.late' if late else ''}.{name}"]
            rows = tensor[::61] if tensor.ndim == 2 else tensor
            digest.update(rows.to(torch.bfloat16).view(torch.int16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture(params=[False, True], ids=["all", "late"])
def version_1(request, tmp_path):
    """A checkpoint with dynamic experts, as version 1 wrote it."""
    checkpoint = dynamic_pipeline(activation="relu", late_ffn=request.param).to_checkpoint()
    write_checkpoint(tmp_path / "model", checkpoint)
    head = read_json(tmp_path / "model" / "config.json")
    del head["digest"], head["digests"]
    head["version"], head["model"] = 1, to_version_1(head["model"])
    experts = head["model"]["transformer"]["dynamic"]["experts"]
    head["model"]["transformer"]["dynamic"]["identity"] = compute_identity(
        checkpoint.transformer, checkpoint.config.transformer.depth, f"{experts} relu {request.param}", request.param
    )
    write_json(tmp_path / "model" / "config.json", head)
    return tmp_path / "model"


def test_a_version_1_checkpoint_with_dynamic_experts(version_1):
    checkpoint = read_checkpoint(version_1)
    model = checkpoint.config.transformer
    dynamic = model.dynamic
    assert read_config(version_1)[0].transformer.dynamic.late_ffn == dynamic.late_ffn
    assert dynamic.router_fingerprint == compute_router_fingerprint(
        checkpoint.transformer, checkpoint.config.transformer
    )
    check_router_fingerprint(version_1, checkpoint)
    write_checkpoint(version_1, checkpoint)
    assert read_json(version_1 / "config.json")["version"] == VERSION == 2
    assert read_checkpoint(version_1).config == checkpoint.config


def test_routers_of_other_ffns_are_refused_in_version_1_too(version_1):
    head = json.loads((version_1 / "config.json").read_text())
    head["model"]["transformer"]["dynamic"]["identity"] = "0" * 16
    write_json(version_1 / "config.json", head)
    with pytest.raises(UserError, match="its routers were trained for another checkpoint"):
        check_router_fingerprint(version_1, read_checkpoint(version_1))


def test_a_run_of_version_1_is_the_same_run(tmp_path):
    settings = to_dict(RunConfig(transformer=TransformerConfig(depth=3)))
    assert migrate_record(to_version_1(settings)) == settings
    write_json(tmp_path / "run.json", to_version_1(settings))
    check_settings(tmp_path, settings, accept_changes=False)
    record_settings(tmp_path / "run.json", settings)
    other = to_dict(RunConfig(transformer=TransformerConfig(depth=3, options={"top": 2})))
    with pytest.raises(UserError, match="transformer.options"):
        check_settings(tmp_path, other, accept_changes=False)
    with pytest.raises(UserError, match=r"other settings: transformer.options.top was None, now 2"):
        record_settings(tmp_path / "run.json", other)


CONFIGS = (RunConfig, TokenizerRunConfig, ClassifierRunConfig, EncoderRunConfig, QuickstartConfig)


def list_fields(settings, prefix=""):
    """Each setting by its path, such as train.seed."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from list_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_setting_that_was_added_later_has_its_default_in_older_records(kind, tmp_path):
    # The defaults of 2026-11-26, as that version wrote them. Whoever adds a setting adds it to `migrate._ADDED`, too.
    golden = read_json(Path(__file__).parent / "golden" / "settings-2026-11-26.json")[kind.__name__]
    now, migrated = dict(list_fields(to_dict(kind()))), dict(list_fields(migrate_record(golden)))
    before = dict(list_fields(golden))
    added = {name: value for name, value in now.items() if name not in before}
    assert added, "nothing was added, so this would check nothing"
    assert {name: migrated.get(name, "(missing)") for name in added} == added
    write_json(tmp_path / "run.json", golden)
    check_settings(tmp_path, to_dict(kind()), accept_changes=False)


def test_a_config_file_of_version_1_is_read(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, to_version_1(to_dict(RunConfig())))
    assert read_settings(RunConfig, path) == RunConfig()
    path.write_text("transformer: {dynamic: {own: true, activation: relu}}")
    assert read_settings(RunConfig, path).transformer.dynamic.late_ffn


def test_renaming_leaves_the_rest_and_the_argument_alone():
    data = {"model": {"dynamic": {"own": True, "tau": [1]}, "own": 1}, "rows": [{"dynamic": {"identity": "x"}}]}
    before = json.dumps(data)
    assert rename_settings(data) == {
        "model": {"dynamic": {"late_ffn": True, "tau": [1]}, "own": 1},
        "rows": [{"dynamic": {"router_fingerprint": "x"}}],
    }
    assert json.dumps(data) == before
