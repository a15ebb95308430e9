"""`nextscale sparsify`: from a dense model to dynamic experts, stage by stage."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nextscale.checkpoints.migrate import list_version_1_settings
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.sampling import SampleConfig
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.data.examples import MemoryExamples
from nextscale.evaluation.flops import count_dense_flops
from nextscale.pipeline import Pipeline
from nextscale.sampling.thresholds import Budget, interpolate_tau, read_budgets, resolve_budget
from nextscale.sparsify import stages
from nextscale.sparsify.calibrate import GRID, Measurement, calibrate_thresholds, choose_thresholds
from nextscale.sparsify.convert import replace_gelu
from nextscale.sparsify.tasks import AdaptTask, RouterTask, TuneTask
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.conftest import randomised, tiny_config
from tests.test_dynamic import dynamic_pipeline

FAST = (
    "--samples 40 --scales 2 --expert-size 16 --router-width 8 --calibration-images 4 --batch-size 4 --device cpu "
    "--budgets 0.95 0.85 --budget 0.85 --tuning.epochs 0 --tuning.steps 4 --tuning.batch-size 8 --tuning.save-every 2 "
    "--tuning.warmup-epochs 0 --tuning.learning-rate 1e-3 --routers.epochs 0 --routers.steps 6 --routers.batch-size 8 "
    "--routers.save-every 2"
)


def run(text: str) -> int:
    return main(text.split())


def fails(text, capsys) -> str:
    capsys.readouterr()
    assert run(text) == 2
    lines = [n for n in capsys.readouterr().err.strip().splitlines() if n.startswith("nextscale: error")]
    assert len(lines) == 1
    return lines[0]


def weights(folder):
    return read_checkpoint(Path(folder)).transformer


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A dense model and what the command makes of it, late FFNs tuned."""
    out = tmp_path_factory.mktemp("sparsify") / "late"
    assert run(f"sparsify {tiny_folder} --out {out} {FAST}") == 0
    return tiny_folder, out


def test_the_result_is_an_ordinary_checkpoint_of_which_only_late_ffns_are_new(made, tmp_path, capsys):
    dense, out = made
    before, after = weights(dense), weights(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    new = {name.split(".ffn.")[1].split(".")[0] for name in after.keys() - before.keys()}
    assert new == {"late", "router", "importance_F", "activation_F"}
    late = after["blocks.0.ffn.late.fc1.weight"]
    assert not torch.equal(late, before["blocks.0.ffn.fc1.weight"]), "tuned and in another order"
    assert (after["blocks.1.ffn.importance_F"] > 0).any()
    config = read_checkpoint(out).config.transformer.dynamic
    assert (config.experts, config.scales, config.late_ffn, config.activation) == (8, 2, True, "relu")
    assert len(config.tau) == 2
    report = json.loads((out / "sparsify.json").read_text())
    assert list(report["stages"]) == ["tune", "split", "routers", "thresholds"]
    assert (out / "sparsify.png").exists()
    capsys.readouterr()
    grid = f"--labels 0,none --out {tmp_path}/a.png --tokens-out {tmp_path}"
    assert run(f"sample {out} {grid}/own.safetensors") == 0
    assert run(f"sample {out} {grid}/budget.safetensors --budget 0.85") == 0
    assert run(f"sample {out} {grid}/tau.safetensors --tau {','.join(map(repr, config.tau))}") == 0
    own, budget, tau = (Path(tmp_path / f"{n}.safetensors").read_bytes() for n in ("own", "budget", "tau"))
    assert own == budget == tau, "the model's own tau is that of its budget"
    assert run(f"analyse dynamic {out} --out {tmp_path}/looks --taus 0.5 --num 4 --columns 2") == 0
    rows = json.loads((tmp_path / "looks" / "dynamic.json").read_text())["rows"]
    assert rows[0]["share"] == 1
    assert rows[1]["share"] < 1
    assert all((tmp_path / "looks" / f"{name}.png").exists() for name in ("experts", "samples"))
    assert run(f"info {out}") == 0


def test_early_scales_stay_those_of_the_dense_model(made):
    """By default, as in DMoE-VAR; the last two scales are tuned."""
    labels, inputs = torch.tensor([0, 3]), torch.randn(2, 29, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (Pipeline.from_pretrained(f).transformer(labels, inputs).logits_BNV for f in made)
    early = Pipeline.from_pretrained(made[0]).config.pyramid.spans[-2][0]
    torch.testing.assert_close(b[:, :early], a[:, :early], rtol=1e-5, atol=1e-5)
    assert (a - b)[:, early:].abs().max() > 1e-2


def test_a_run_that_tuned_the_whole_model_is_not_continued_as_another(made, tmp_path, capsys):
    """As one of an earlier version, whose default it was."""
    dense, _ = made
    command = f"sparsify {dense} --out {tmp_path}/out {FAST} --stages tune"
    assert run(f"{command} --tune all") == 0
    assert "tune was all, now late" in fails(command, capsys)


def test_finished_stages_are_not_done_again(made, capsys):
    dense, out = made
    logs = [(out / "stages" / stage / "log.jsonl") for stage in ("tune", "routers")]
    before, text = weights(out), [log.read_text() for log in logs]
    assert run(f"sparsify {dense} --out {out} --tune late {FAST}") == 0
    after = weights(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [sum("relative_error" in r or "hoyer" in r for r in read_log(log)) for log in logs] == [
        sum('"relative_error"' in n or '"hoyer"' in n for n in t.splitlines()) for t in text
    ]
    capsys.readouterr()
    changed = fails(f"sparsify {dense} --out {out} --tune late {FAST} --hoyer 0.5", capsys)
    assert "hoyer was 0.1, now 0.5" in changed


def test_an_interrupted_run_ends_with_the_same_weights(made, tmp_path, monkeypatch, capsys):
    dense, whole = made
    forward = RouterTask.forward
    out, calls = tmp_path / "out", itertools.count()

    def breaks(self, batch, noise, step):
        if noise and step == 4 and next(calls) == 0:
            raise KeyboardInterrupt
        return forward(self, batch, noise, step)

    monkeypatch.setattr(RouterTask, "forward", breaks)
    assert run(f"sparsify {dense} --out {out} --tune late {FAST}") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (out / "config.json").exists()
    assert run(f"sparsify {dense} --out {out} --tune late {FAST}") == 0
    expected, found = weights(whole), weights(out)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert read_checkpoint(out).config == read_checkpoint(whole).config


def test_each_stage_alone_and_without_tuning(made, tmp_path, capsys):
    dense, _ = made
    steps = [dense, *(tmp_path / name for name in ("split", "routers", "thresholds"))]
    for before, after in itertools.pairwise(steps):
        assert run(f"sparsify {before} --out {after} --tune none --stages {after.name} {FAST}") == 0
    labels, inputs = torch.tensor([0, 3]), torch.randn(2, 29, 4)
    with torch.no_grad():
        a, b = (Pipeline.from_pretrained(f).transformer(labels, inputs).logits_BNV for f in (dense, steps[-1]))
    assert ((a - b).abs().max() / a.abs().max()).item() <= 1e-5, "only a permutation, and GELU as before"
    fingerprints = [read_checkpoint(f).config.transformer.dynamic.router_fingerprint for f in steps]
    assert [bool(fingerprint) for fingerprint in fingerprints] == [False, False, True, True]
    assert not read_budgets(read_checkpoint(steps[2]).origin)
    assert read_budgets(read_checkpoint(steps[3]).origin)[0].share == 1
    assert "was not" not in fails(f"sample {steps[2]} --labels 0 --budget 0.9 --out {tmp_path}/a.png", capsys)
    assert run(f"sparsify {dense} --out {tmp_path}/all --tune all {FAST}") == 0
    tuned = read_checkpoint(tmp_path / "all").transformer
    assert not torch.equal(tuned["head.weight"], weights(dense)["head.weight"]), "the whole model is tuned"
    assert "blocks.0.ffn.late.fc1.weight" not in tuned


ADAPT = (
    "--adapting.epochs 0 --adapting.steps 4 --adapting.batch-size 8 --adapting.save-every 2 --adapting.warmup-epochs 0 "
    "--adapting.learning-rate 1e-3"
)


@pytest.mark.parametrize("tune", ["late", "all"])
def test_a_model_adapts_to_the_experts_that_run(tune, made, tmp_path, monkeypatch, capsys):
    """Its routers stay, what is tuned changes; interrupted, it ends with the same weights."""
    dense, late = made
    before = late if tune == "late" else tmp_path / "before"
    if tune == "all":
        assert run(f"sparsify {dense} --out {before} --tune all {FAST}") == 0
    whole, out, calls = tmp_path / "whole", tmp_path / "out", itertools.count()
    command = f"sparsify {before} --stages adapt thresholds {FAST} {ADAPT}"
    assert run(f"{command} --out {whole}") == 0
    forward, seen = AdaptTask.forward, []

    def breaks(self, batch, noise, step):
        seen.append(self.thresholds.tau_K)
        if noise and step == 3 and next(calls) == 0:
            raise KeyboardInterrupt
        return forward(self, batch, noise, step)

    monkeypatch.setattr(AdaptTask, "forward", breaks)
    assert run(f"{command} --out {out}") == 130
    assert run(f"{command} --out {out}") == 0
    a, b, c = weights(before), weights(whole), weights(out)
    assert all(torch.equal(c[name], tensor) for name, tensor in b.items())
    changed = {name for name, tensor in a.items() if not torch.equal(b[name], tensor)}
    assert "blocks.0.ffn.late.fc1.weight" in changed or "blocks.0.ffn.fc1.weight" in changed
    assert not any(".router." in name for name in changed)
    assert ("head.weight" in changed) == (tune == "all"), "late FFNs are adapted alone"
    assert len(set(seen)) == 1
    assert seen[0][:2] == (1.0, 1.0)
    assert min(seen[0]) < 1
    assert run(f"sample {out} --labels 0 --budget 0.85 --out {tmp_path}/a.png") == 0
    kept = out / "stages" / "adapt" / "tau.json"
    calibrated = json.loads(kept.read_text())["tau"]
    other = command.replace("--budget 0.85", "--budget 0.95") + f" --out {out} --accept-changes"
    assert run(other) == 0
    assert json.loads(kept.read_text())["tau"] > calibrated, "calibrated anew for another budget"
    assert list(json.loads((out / "sparsify.json").read_text())["stages"]) == ["adapt", "thresholds"]


def test_what_cannot_be_sparsified_is_named(made, tmp_path, capsys):
    dense, dynamic = made
    checkpoint = read_checkpoint(dense)
    write_checkpoint(tmp_path / "codes", replace(checkpoint, config=replace(checkpoint.config, transformer=None)))
    out = f"--out {tmp_path}/out {FAST}"
    assert "tokenizer alone" in fails(f"sparsify {tmp_path}/codes {out}", capsys)
    assert "divided already, into 8 experts" in fails(f"sparsify {dynamic} {out}", capsys)
    assert "begin with --stages split" in fails(f"sparsify {dense} {out} --stages thresholds", capsys)
    assert "must follow one another" in fails(f"sparsify {dense} {out} --stages tune routers", capsys)
    assert "needs a budget" in fails(f"sparsify {dense} {out} --stages adapt thresholds --budget 0", capsys)
    assert "begin with --stages split adapt" in fails(f"sparsify {dense} {out} --stages adapt thresholds", capsys)
    assert "cannot be divided into experts of 100" in fails(f"sparsify {dense} {out} --expert-size 100", capsys)
    assert "9 of them cannot be sparse" in fails(f"sparsify {dense} {out} --scales 9", capsys)
    assert "is also the input MODEL" in fails(f"sparsify {dense} --out {dense}", capsys)
    assert not (tmp_path / "out").exists()
    assert "has dynamic FFNs" in fails(f"export-official {dynamic} --var {tmp_path}/v.safetensors", capsys)


@pytest.mark.parametrize("stage", ["tune", "split"])
def test_a_mixture_is_refused_before_anything_is_done(stage, tmp_path, capsys):
    randomised(tiny_config(experts=ExpertsConfig(router="stmoe"))).save_pretrained(tmp_path / "mixture")
    message = fails(f"sparsify {tmp_path}/mixture --out {tmp_path}/out --stages {stage} {FAST}", capsys)
    assert "this model is a mixture of experts (stmoe)" in message
    assert "sparsify a dense model instead" in message
    assert not (tmp_path / "out").exists()


def test_an_old_checkpoint_with_dynamic_experts_inside_a_mixture_is_refused(tmp_path, capsys):
    randomised(tiny_config(experts=ExpertsConfig(router="stmoe"))).save_pretrained(tmp_path / "old")
    head = json.loads((tmp_path / "old" / "config.json").read_text())
    head["model"]["transformer"]["dynamic"] |= {"experts": 8, "scales": 2}
    (tmp_path / "old" / "config.json").write_text(json.dumps(head))
    message = fails(f"sample {tmp_path}/old --labels 0 --out {tmp_path}/a.png", capsys)
    assert "dynamic experts inside a mixture of experts (stmoe) are not supported" in message
    assert "sparsify a dense model, or use the mixture without them" in message


def test_routers_of_another_checkpoint_are_refused(made, tmp_path, capsys):
    _, dynamic = made
    checkpoint = read_checkpoint(dynamic)
    name = "blocks.0.ffn.late.fc2.weight"
    checkpoint.transformer[name] = checkpoint.transformer[name] * 1.1
    write_checkpoint(tmp_path / "other", checkpoint)
    message = fails(f"sample {tmp_path}/other --labels 0 --out {tmp_path}/a.png", capsys)
    assert "its routers were trained for another checkpoint" in message
    message = fails(f"sparsify {tmp_path}/other --stages thresholds --out {tmp_path}/x {FAST}", capsys)
    assert "routers were trained for another checkpoint" in message
    assert run(f"sparsify {tmp_path}/other --stages routers thresholds --out {tmp_path}/again {FAST}") == 0
    assert run(f"sample {tmp_path}/again --labels 0 --out {tmp_path}/a.png") == 0


def test_stages_of_version_0_1_0_are_recognized():
    """Their run.json has the fingerprint of a config with these settings."""
    checkpoint = randomised(tiny_config()).to_checkpoint()
    settings = list_version_1_settings(checkpoint.config, checkpoint.transformer)["transformer"]
    assert list(settings) == [
        "depth", "width", "heads", "ffn_ratio", "qk_norm", "shared_adaln", "norm_eps", "mixers", "global_blocks",
        "mamba", "condition", "experts", "alignment", "dynamic",
    ]  # fmt: skip
    assert list(settings["dynamic"]) == [
        "experts", "scales", "activation", "own", "router_width", "tau", "identity"
    ]  # fmt: skip
    own = replace(checkpoint.config.transformer, options={"mine": 1})
    changed = replace(checkpoint, config=replace(checkpoint.config, transformer=own))
    assert stages._compute_fingerprint(changed) != stages._compute_fingerprint(checkpoint)


def test_a_process_that_holds_no_weights_reads_them_back(made, monkeypatch):
    """Of several processes the first alone gathers a trained model: the others once went on without one."""
    _, dynamic = made
    monkeypatch.setattr(stages, "gather_weights", lambda model: {})
    world = SimpleNamespace(main=False, wait=lambda: None)
    job = stages.Job(SparsifyConfig(), None, dynamic / "stages", world, False)
    found = stages._save_model(job, "routers", read_checkpoint(dynamic / "stages" / "split"), None)
    assert found.config.transformer.dynamic.router_fingerprint
    assert found.transformer.keys() == weights(dynamic).keys()


# ---- tasks


def examples(count=6):
    rng = torch.Generator().manual_seed(0)
    return MemoryExamples(
        tokens=torch.randint(32, (count, 30), generator=rng), label=torch.randint(5, (count,), generator=rng)
    )


def test_tuning_adds_the_penalty_and_reaches_late_ffns_alone():
    dense = randomised(tiny_config()).to_checkpoint()
    for own in (False, True):
        pipeline = Pipeline.from_checkpoint(replace_gelu(dense, 2, own))
        task = TuneTask(pipeline.transformer, pipeline.tokenizer, examples(), TrainConfig(), hoyer=0.3)
        batch = examples().fetch(range(6), None)
        loss, found = task(batch, {"drop": torch.zeros(6, dtype=torch.bool)}, 0)
        assert loss.item() == pytest.approx(found["cross_entropy"].item() + 0.3 * found["hoyer"].item(), rel=1e-5)
        loss.backward()
        reached = {n for n, p in pipeline.transformer.named_parameters() if p.grad is not None}
        late = {n for n, _ in pipeline.transformer.named_parameters() if ".late." in n}
        assert reached == late if own else "head.weight" in reached
        assert 1 <= found["hoyer"].item() <= 128
        assert 0.2 < found["zeros"].item() < 0.8


def test_routers_learn_the_norms_and_nothing_else_changes():
    pipeline = dynamic_pipeline(activation="relu", router_fingerprint="")
    model = pipeline.transformer
    task = RouterTask(model, pipeline.tokenizer, examples(), TrainConfig())
    batch = examples().fetch(range(6), None)
    noise = {"drop": torch.tensor([True, False] * 3)}
    loss, _ = task(batch, noise, 0)
    values = torch.where(noise["drop"], 5, batch["label"])
    inputs = pipeline.tokenizer.teacher_inputs(batch["tokens"])
    with torch.no_grad():
        output = model(values, inputs, thresholds=Thresholds((1.0,) * 4, record="norms"))
    errors = []
    for record in output.records:
        p, n = record.norms.predicted_BNE.double().numpy(), record.norms.true_BNE.double().numpy()
        errors.append(((p - n) ** 2).mean() / (n**2).mean())
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=0.02)
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".router." not in n}
    for _ in range(40):
        optimizer.zero_grad()
        again, found = task(batch, noise, 0)
        again.backward()
        optimizer.step()
    assert again.item() < 0.6 * loss.item()
    assert found["recall"].item() > 0.5
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


# ---- thresholds


def test_thresholds_are_allotted_with_the_least_divergence():
    """Against all combinations of a fine grid, on convex curves."""
    config = dynamic_pipeline().config
    dense = count_dense_flops(config, SampleConfig(cfg=0.0))
    fixed, room = 0.6 * dense, 0.2 * dense
    divergences = (lambda t: 3 * (1 - t) ** 2, lambda t: (1 - t) ** 2)

    def point(taus):
        flops = (
            fixed - 2 * config.transformer.width**2 * 14,
            0.0,
            room * taus[0],
            room * taus[1],
        )  # the condition apart
        return Measurement(flops, (0.0, 0.0, divergences[0](taus[0]), divergences[1](taus[1])), *[(0.0,) * 4] * 3)

    points = [point((t, t)) for t in GRID]
    assert points[0].share(config) == pytest.approx(1, abs=0.02)
    fine = [i / 50 for i in range(51)]
    all_points = [point(taus) for taus in itertools.product(fine, fine)]
    shares = [p.share(config) for p in all_points]
    for share, taus in zip((0.95, 0.85, 0.7), choose_thresholds(config, GRID, points, (0.95, 0.85, 0.7)), strict=True):
        found = point(taus)
        assert found.share(config) <= share
        fitting = [p for p, its_share in zip(all_points, shares, strict=True) if its_share <= share]
        assert sum(found.kl_K) <= 1.1 * min(sum(p.kl_K) for p in fitting) + 0.01
    assert choose_thresholds(config, GRID, points, (0.01,)) == [(0.0, 0.0)]


def test_calibrated_shares_are_near_what_was_asked_and_the_divergence_grows():
    pipeline = dynamic_pipeline(activation="relu")
    labels, tokens = torch.arange(4), torch.randint(32, (4, 30), generator=torch.Generator().manual_seed(0))
    shares = (0.95, 0.88, 0.8)
    calibration = calibrate_thresholds(
        pipeline.config, pipeline.tokenizer, pipeline.transformer, [(labels, tokens)], shares
    )
    table, points = calibration.table, calibration.grid
    assert table[0] == Budget(1.0, (1.0, 1.0))
    assert [row.share for row in table[1:]] == pytest.approx(
        [p.share(pipeline.config) for p in calibration.measurements]
    )
    assert [row.share for row in table[1:]] == pytest.approx(shares, abs=0.03)
    assert points[0].share(pipeline.config) == 1
    assert sum(points[0].kl_K) == pytest.approx(0, abs=1e-6)
    active = np.array([p.active_K for p in points])
    assert (np.diff(active[:, 2:], axis=0) <= 0.02).all(), (
        "a smaller threshold runs less; later scales see other inputs"
    )
    assert (active[:, :2] == 1).all()


def test_a_budget_is_looked_up_in_proportion():
    rows = [{"share": 1.0, "tau": [1, 1]}, {"share": 0.8, "tau": [0.9, 0.7]}, {"share": 0.7, "tau": [0.8, 0.5]}]
    origin = {"dynamic": {"budgets": rows}}
    assert interpolate_tau(origin, 0.8) == (0.9, 0.7)
    assert interpolate_tau(origin, 0.75) == pytest.approx((0.85, 0.6))
    assert interpolate_tau(origin, 1.0) == (1, 1)
    settings = resolve_budget(SampleConfig(budget=0.8), origin)
    assert (settings.tau, settings.budget) == ((0.9, 0.7), 0)
    with pytest.raises(UserError, match="below what was calibrated for this checkpoint: 0.700 to 1.000"):
        interpolate_tau(origin, 0.6)
    with pytest.raises(UserError, match="no thresholds were calibrated"):
        interpolate_tau({}, 0.6)
    with pytest.raises(UserError, match="table of budgets cannot be read"):
        interpolate_tau({"dynamic": {"budgets": [{"share": "?"}]}}, 0.6)
