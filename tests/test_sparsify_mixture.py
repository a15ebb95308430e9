"""`nextscale sparsify` of a mixture of experts, and what cannot be done with what it makes."""

import json
from pathlib import Path

import pytest
import torch

from nextscale.checkpoints.native import read_checkpoint, write_checkpoint
from nextscale.checkpoints.upcycle import upcycle
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.model import ClassConditionConfig, ExpertsConfig
from nextscale.pipeline import Pipeline
from nextscale.sparsify.convert import identity
from nextscale.training.engine.parallel import mixtures_of
from tests.conftest import randomised
from tests.test_dynamic import dynamic_pipeline
from tests.test_dynamic_mixture import KINDS, difference, logits, nested
from tests.test_moe_model import moe_config
from tests.test_sparsify import FAST, fails, run

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A mixture for the digits and what the command makes of it."""
    folder = tmp_path_factory.mktemp("nested")
    config = moe_config("stmoe", count=3, active=2, condition=ClassConditionConfig(num_classes=10))
    randomised(config).save_pretrained(folder / "mixture")
    options = FAST.replace("--samples 40", "--data digits --images.limit 60 --images.held-out 0.2")
    assert run(f"sparsify {folder}/mixture --out {folder}/out {options}") == 0
    return folder / "mixture", folder / "out", options


def test_the_stages_make_an_ordinary_checkpoint_with_a_dial(made, tmp_path, capsys):
    mixture, out, _ = made
    checkpoint, before = read_checkpoint(out), read_checkpoint(mixture).transformer
    model = checkpoint.config.transformer
    assert (model.experts.router, model.experts.count, model.experts.active) == ("stmoe", 3, 2)
    assert (model.dynamic.experts, model.dynamic.scales, model.dynamic.activation) == (8, 2, "relu")
    assert len(model.dynamic.tau) == 2
    for name in ("head.weight", "blocks.0.ffn.router.score.weight"):
        assert not torch.equal(checkpoint.transformer[name], before[name]), "the whole model is tuned, routers too"
    used = [checkpoint.transformer[f"blocks.1.ffn.experts.{j}.importance_F"] for j in range(3)]
    assert sum((importance_F > 0).any().item() for importance_F in used) >= 2
    report = json.loads((out / "sparsify.json").read_text())
    assert list(report["stages"]) == ["tune", "split", "routers", "thresholds"]
    assert report["stages"]["tune"]["validation_balance"] > 0
    assert [row["share"] for row in report["stages"]["thresholds"]["table"]] == pytest.approx([0.95, 0.85], abs=0.05)
    Pipeline.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert (out / "transformer.safetensors").read_bytes() == (tmp_path / "again/transformer.safetensors").read_bytes()
    grid = f"--labels 0,none --out {tmp_path}/a.png --tokens-out {tmp_path}"
    assert run(f"sample {out} {grid}/own.safetensors") == 0
    assert run(f"sample {out} {grid}/budget.safetensors --budget 0.85") == 0
    assert Path(tmp_path / "own.safetensors").read_bytes() == Path(tmp_path / "budget.safetensors").read_bytes()
    for selection in KINDS:
        assert run(f"sample {out} {grid}/other.safetensors --tau 0.5 --selection {selection}") == 0
    assert run(f"analyse dynamic {out} --out {tmp_path}/looks --taus 0.5 --num 4 --columns 2") == 0
    rows = json.loads((tmp_path / "looks" / "dynamic.json").read_text())["rows"]
    assert rows[0]["share"] == 1
    assert rows[1]["share"] < 1
    assert all((tmp_path / "looks" / f"{name}.png").exists() for name in ("experts", "samples"))
    assert run(f"analyse load {out} --data digits --out {tmp_path}/load --num 4") == 0
    capsys.readouterr()
    assert run(f"info {out}") == 0
    assert "of them active" in capsys.readouterr().out


def test_routers_of_other_experts_are_refused_and_trained_anew(made, tmp_path, capsys):
    _, out, options = made
    checkpoint = read_checkpoint(out)
    model, weights = checkpoint.config.transformer, checkpoint.transformer
    assert identity(weights, model) == model.dynamic.identity
    name = "blocks.1.ffn.experts.2.fc1.bias"
    checkpoint.transformer[name] = weights[name] * 1.1
    write_checkpoint(tmp_path / "other", checkpoint)
    message = fails(f"sample {tmp_path}/other --labels 0 --out {tmp_path}/a.png", capsys)
    assert "its routers were trained for another checkpoint" in message
    assert run(f"sparsify {tmp_path}/other --stages routers thresholds --out {tmp_path}/again {options}") == 0
    assert run(f"sample {tmp_path}/again --labels 0 --budget 0.9 --out {tmp_path}/a.png") == 0


def test_late_ffns_alone_and_split_alone(made, tmp_path):
    mixture, _, options = made
    before = read_checkpoint(mixture).transformer
    assert run(f"sparsify {mixture} --out {tmp_path}/split --tune none --stages split {options}") == 0
    expected, found = (logits(Pipeline.from_pretrained(f)) for f in (mixture, tmp_path / "split"))
    assert difference(found, expected) <= 1e-5, "only a permutation, and GELU as before"
    assert run(f"sparsify {mixture} --out {tmp_path}/late --tune late --stages tune split {options}") == 0
    after = read_checkpoint(tmp_path / "late").transformer
    assert torch.equal(after["blocks.0.ffn.experts.2.fc1.weight"], before["blocks.0.ffn.experts.fc1.weight"][2])
    assert torch.equal(after["blocks.0.ffn.router.score.weight"], before["blocks.0.ffn.router.score.weight"])
    assert not torch.equal(after["blocks.0.ffn.experts.2.late.fc2.bias"], before["blocks.0.ffn.experts.fc2.bias"][2])


def test_what_cannot_be_done_with_it_is_named(made, tmp_path, capsys):
    mixture, out, options = made
    assert "divided already, into 8 experts" in fails(f"sparsify {out} --out {tmp_path}/x {options}", capsys)
    assert "cannot be divided into experts of 100" in fails(
        f"sparsify {mixture} --out {tmp_path}/x {options} --expert-size 100", capsys
    )
    assert "mixture of experts (stmoe)" in fails(f"export-official {out} --var {tmp_path}/v.safetensors", capsys)
    pipeline = nested()
    with pytest.raises(UserError, match="captured steps cannot run a mixture whose experts are divided"):
        pipeline.capture().sample([0])
    with pytest.raises(UserError, match="sharding: experts cannot share experts that are dynamic FFNs"):
        mixtures_of(pipeline.transformer, "transformer")
    with pytest.raises(UserError, match="a mixture of experts already"):
        upcycle(pipeline.to_checkpoint(), ExpertsConfig(router="smoe"))
    with pytest.raises(UserError, match="FFNs are dynamic ones"):
        upcycle(dynamic_pipeline().to_checkpoint(), ExpertsConfig(router="smoe"))
    with pytest.raises(UserError, match="routers are not trained"):
        nested(identity="").sample([0], tau=(0.5,))
    assert main(f"sparsify {mixture} --out {tmp_path}/x --stages thresholds".split()) == 2
