"""Experiments: every entry at every scale, one of them whole at the tiny scale, killed in the middle and continued."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.sparsify import SparsifyConfig
from nextscale.data.cache import TokenCache
from nextscale.pipeline import Pipeline
from nextscale.research.experiments.dynamic import _list_key_settings
from nextscale.research.experiments.entry import SCALES, list_experiments, load_experiment
from nextscale.research.experiments.figures import GROUPS, Point, describe_column, draw_results, list_panels
from nextscale.research.experiments.keys import compute_key
from nextscale.research.experiments.records import find_kept_model
from nextscale.research.experiments.report import format_table, group_lines
from nextscale.research.experiments.run import resolve_inputs, run_experiment
from nextscale.research.experiments.show import format_experiment
from tests import forked


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """The folder of mepa-cost at the tiny scale, with what all entries train first: a classifier and a tokenizer."""
    folder = tmp_path_factory.mktemp("costs")
    assert run("mepa-cost", folder) == 0
    return folder


@pytest.fixture
def out(costs, tmp_path):
    """A folder in which classifier, encoder and tokenizer are trained, and nothing else."""
    shutil.copytree(costs / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("run-*", "cache-*", "mepa-*"))
    return tmp_path


def run(name, out):
    return main(["experiment", "run", name, "--scale", "tiny", "--device", "cpu", "--out", str(out)])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", list_experiments())
def test_every_entry_is_complete_at_every_scale(name, scale):
    for on_cpu in (False, True):
        experiment = load_experiment(name, scale, on_cpu=on_cpu)
        assert len(experiment.rows) >= (1 if experiment.one_training else 2)
        assert len({row.name for row in experiment.rows}) == len(experiment.rows)
        guided = any(row.run.loss.encoder == "given" for row in experiment.rows)
        assert set(experiment.needs) == {"data", "tokenizer", "features", "reference"} | (
            {"encoder"} if guided else set()
        )
    if scale == SCALES[list_experiments().index(name) % len(SCALES)]:  # its costs are slow to estimate
        text = format_experiment(experiment)
        assert experiment.title in text
        assert text.count("published ") >= len(experiment.rows)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_models_that_are_compared_for_their_depth_differ_in_nothing_else(on_cpu):
    """A row's own settings come after those for a CPU, and must not undo them."""
    models = {row.run.transformer for row in load_experiment("dmoe-depth", "cifar", on_cpu=on_cpu).rows}
    of_depth_one = {replace(m, depth=1, width=m.width or 64 * m.depth, heads=m.heads or m.depth) for m in models}
    assert len(of_depth_one) == 1
    assert len({model.depth for model in models}) == 2


def test_paper_scale_is_the_published_configuration(capsys):
    sizes = load_experiment("var-sizes", "paper")
    assert [row.run.transformer.depth for row in sizes.rows] == [16, 20, 24, 30]
    assert [row.run.train.epochs for row in sizes.rows] == [200, 250, 350, 350]
    assert sizes.images == 50_000
    assert all((r.sampling.cfg, r.sampling.top_k, r.sampling.top_p) == (1.5, 900, 0.96) for r in sizes.rows)
    assert sizes.rows[0].published == {
        "distance": 3.55, "score": 280.4, "precision": 0.84, "recall": 0.51, "parameters": 310e6
    }  # fmt: skip
    assert main(["experiment", "show", "var-sizes"]) == 0
    out = capsys.readouterr().out
    assert "GPU-hours" in out
    assert "310,283,520 parameters" in out
    assert main(["experiment", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in list_experiments())


def test_what_is_missing_is_named(capsys):
    with pytest.raises(UserError, match=r"var-sizes at scale cifar needs --data: images to train on"):
        resolve_inputs(load_experiment("var-sizes", "cifar"), {})
    with pytest.raises(UserError, match=r"needs --features: a feature network .*pt_inception-2015-12-05"):
        resolve_inputs(load_experiment("var-sizes", "paper"), {"data": "imagenet", "tokenizer": "vae"})
    with pytest.raises(UserError, match="the rows of var-sizes differ in training: one --model cannot stand for them"):
        resolve_inputs(load_experiment("var-sizes", "tiny"), {"model": "runs/d16"})
    assert main(["experiment", "show", "var-size"]) == 2
    assert "there is no experiment 'var-size'; did you mean 'var-sizes'?" in capsys.readouterr().err


def test_a_whole_experiment_killed_in_the_middle_and_continued(tmp_path, capsys):
    """Finished runs are not repeated, an interrupted training goes on, and the table holds what was measured."""
    options = ["--scale", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    command = ["experiment", "run", "var-guidance", *options]
    tiny = tmp_path / "tiny"
    process = forked.start(main, command, files=tmp_path / "said")
    deadline = time.monotonic() + 240
    while len(list(tiny.glob("run-*/measured-*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill(signal.SIGKILL)
    process.end()
    assert not (tiny / "var-guidance").exists(), "killed before the end"
    finished = [
        f for f in tiny.glob("*/*") if f.name in ("finished.json", "log.jsonl") or f.name.startswith("measured")
    ]
    finished = {f: f.stat().st_mtime_ns for f in finished if (f.parent / "finished.json").exists() and f.is_file()}
    assert len(finished) >= 6
    assert main(command) == 0
    assert all(f.stat().st_mtime_ns == at for f, at in finished.items()), "something finished was done again"

    results = json.loads((tiny / "var-guidance" / "results.json").read_text())
    assert [row["at"] for row in results["rows"]] == [0, 1, 3]
    assert results["features"] == "classifier"
    assert len(list(tiny.glob("run-*"))) == 2, "one training for each seed, whatever the guidance"
    for row in results["rows"]:
        figure = row["figures"]["distance"]
        assert len(figure["values"]) == 2
        assert figure["mean"] == pytest.approx(statistics.fmean(figure["values"]))
        assert figure["deviation"] == pytest.approx(statistics.stdev(figure["values"]))
    lines = (tiny / "var-guidance" / "table.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| var-guidance"))
    assert "classifier_fd" in head
    assert "| cfg 3 |" in "\n".join(lines)
    assert (tiny / "var-guidance" / "figure.png").stat().st_size > 1000
    (model, *_) = sorted(tiny.glob("run-*"))
    capsys.readouterr()
    assert main([*command[:-1], str(tmp_path / "alone"), "--model", str(model)]) == 0
    assert "training the transformer" not in capsys.readouterr().err, "a model that is given is measured as it is"
    measured = json.loads((tmp_path / "alone" / "tiny" / "var-guidance" / "results.json").read_text())
    assert [len(row["figures"]["distance"]["values"]) for row in measured["rows"]] == [2, 2, 2]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "training the" not in said.err, "nothing is left to train"
    assert "var-guidance: 2 of 2 trainings are done, 6 of 6 models are measured\n" in said.out


def test_the_table_sets_published_figures_beside_ours():
    figure = {"values": [1.0, 3.0], "mean": 2.0, "deviation": 1.4142}
    results = {
        "experiment": "e", "title": "T", "source": "S", "scale": "paper", "seeds": [0, 1], "images": 50000,
        "figures": ["distance", "score"], "features": "inception", "inputs": {"data": "imagenet", "tokenizer": "train"},
        "machine": {"device": "D", "threads": 2, "torch": "2", "date": "2026-01-01"},
        "rows": [
            {"name": "a", "at": None, "published": {"distance": 3.55}, "figures": {"distance": figure}},
            {"name": "b", "at": None, "published": {"score": 280.4}, "figures": {"distance": figure}},
            {"name": "c", "at": None, "published": {"score": 81.5}, "figures": {}},
        ],
    }  # fmt: skip
    lines = format_table(results).splitlines()
    assert "| e | fid, published | inception_score, published | fid |" in lines
    assert "| a | 3.55 | not available | 2 ± 1.414 |" in lines
    assert "| b | not available | 280.4 | 2 ± 1.414 |" in lines
    assert "| c | not available | 81.5 | - |" in lines, "a line of published figures alone"
    assert "`nextscale experiment run e --scale paper --data imagenet`, D, 2 threads, torch 2, 2026-01-01." in lines


def test_quality_over_training_is_measured_on_models_that_it_kept(out):
    """Of 320 images 16 a step: after 4, 12 and all 20 steps, with the validation of these steps."""
    entry = load_experiment("mepa-epochs", "tiny")
    experiment = replace(entry, rows=entry.rows[:5:2], seeds=(0,))
    results = run_experiment(experiment, resolve_inputs(experiment, {}), out, World())
    rows = [row["figures"] for row in results["rows"]]
    assert [row["epochs"]["mean"] for row in rows] == [0.2, 0.6, 1.0]
    (folder,) = (out / "tiny").glob("run-*")
    kept = [folder / f"kept/step-{step:08d}" for step in (4, 8, 12, 16, 20)]
    assert sorted((folder / "kept").iterdir()) == kept
    weights = [(path / "transformer.safetensors").read_bytes() for path in (*kept, folder)]
    assert len(set(weights)) == 5
    assert weights[-1] == weights[-2], "the last one is the run's own"
    losses = {r["step"]: r["validation_loss"] for r in read_log(folder / "log.jsonl") if "validation_loss" in r}
    assert [row["validation_loss"]["mean"] for row in rows] == [losses[step] for step in (4, 12, 20)]
    assert len({row["distance"]["mean"] for row in rows}) == 3
    assert (out / "tiny" / "mepa-epochs" / "curves.png").stat().st_size > 1000
    shutil.rmtree(folder / "kept")
    with pytest.raises(UserError, match="kept no model besides the last one: its training needs train.model_every"):
        find_kept_model(folder, 0.5)


def test_accelerations_train_a_refiner_and_count_what_was_computed(out):
    assert run("var-accelerations", out) == 0
    tiny = out / "tiny"
    assert len(list(tiny.glob("run-*"))) == 2, "two models for each seed"
    rows = json.loads((tiny / "var-accelerations" / "results.json").read_text())["rows"]
    gflop = {row["name"]: row["figures"]["gflop"]["mean"] for row in rows}
    assert gflop["the refiner alone"] < gflop["CoDe, refiner for the last map"] < gflop["all of it"]
    assert gflop["last map: 50 % left out"] < gflop["all of it"]


def test_a_refiner_goes_with_a_model():
    with pytest.raises(UserError, match="takes --model and --refiner together"):
        resolve_inputs(load_experiment("var-accelerations", "tiny"), {"model": "runs/a"})
    with pytest.raises(UserError, match="takes no --refiner"):
        resolve_inputs(load_experiment("var-guidance", "tiny"), {"model": "runs/a", "refiner": "runs/b"})


def test_encoders_are_trained_untrained_and_the_classifiers(out, capsys):
    """Table 5 in small: four trainings for each seed, three encoders, each cached once."""
    tiny = out / "tiny"
    assert run("mepa-encoders", out) == 0
    found = {kind: len(list(tiny.glob(f"{kind}-*"))) for kind in ("run", "cache", "encoder", "classifier")}
    assert found == {"run": 4, "cache": 4, "encoder": 2, "classifier": 1}
    assert sorted(json.loads(f.read_text())["steps"] for f in tiny.glob("encoder-*/config.json")) == [0, 20]
    rows = {row["name"]: row for row in json.loads((tiny / "mepa-encoders" / "results.json").read_text())["rows"]}
    assert "guidance" not in rows["VAR"]["figures"]
    guidance = [row["figures"]["guidance"]["mean"] for name, row in rows.items() if name.startswith("+SG, ")]
    assert len(set(guidance)) == 3
    assert all(-1 <= value < 0 for value in guidance), "of three scales one is intermediate: minus a cosine"
    assert rows["+SG-DINOv3"]["figures"] == {}
    assert rows["+SG-DINOv3"]["published"]["distance"] == 3.59
    capsys.readouterr()
    assert run("mepa-ablation", out) == 0
    assert capsys.readouterr().err.count("training the transformer: 100%") == 2, (
        "+STMoE with and without guidance; all else is there"
    )


def test_encoders_that_differ_want_images(tmp_path):
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(UserError, match="the rows of mepa-encoders differ in their encoder: --data must be images"):
        resolve_inputs(load_experiment("mepa-encoders", "tiny"), {"data": str(tmp_path)})


def test_costs_are_timed_in_turns_and_maps_are_drawn_once(costs):
    of_cost = costs / "tiny" / "mepa-cost"
    rows = {row["name"]: row for row in json.loads((of_cost / "results.json").read_text())["rows"]}
    dense, mepa = (rows[name]["figures"] for name in ("VAR-d20", "MEPA-d16, 100 epochs"))
    assert dense["active_parameters"]["mean"] == pytest.approx(mepa["active_parameters"]["mean"], rel=0.05)
    assert mepa["parameters"]["mean"] > 1.5 * mepa["active_parameters"]["mean"]
    for figures in (dense, mepa):
        times = ("seconds_per_image_of_8", "seconds_per_image_of_1", "seconds_per_epoch")
        assert all(figures[name]["mean"] > 0 for name in times), "which is less depends on what else the machine does"
    assert rows["SiT-XL/2"]["figures"] == {}
    timed = (of_cost / "times.json").stat().st_mtime_ns
    assert run("mepa-cost", costs) == 0
    assert (of_cost / "times.json").stat().st_mtime_ns == timed

    for _ in range(2):
        assert run("mepa-routing", costs) == 0
    folder = costs / "tiny" / "mepa-routing"
    assert (folder / "routing.json").stat().st_mtime_ns < (folder / "results.json").stat().st_mtime_ns
    found = json.loads((folder / "routing.json").read_text())["models"]
    assert [model["router"] for model in found] == ["smoe", "stmoe"]
    load = json.loads((folder / "results.json").read_text())["rows"][0]["figures"]
    assert sum(load[f"load_E{j}"]["mean"] for j in range(1, 9)) == pytest.approx(64, rel=1e-4)


def test_the_shares_of_attention_are_columns_and_a_picture(out):
    """Of a dense model and a mixture, on the images that training held out; measured once."""
    assert run("mvar-attention", out) == 0
    folder = out / "tiny" / "mvar-attention"
    drawn = json.loads((folder / "attention.json").read_text())["models"]
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [model["name"] for model in drawn] == [row["name"] for row in rows] == ["VAR", "STMoE"]
    for model, row in zip(drawn, rows, strict=True):
        found = {name: figure["mean"] for name, figure in row["figures"].items() if "attention" in name}
        shares = model["own_share_per_scale"]
        expected = {"own_attention": model["own_share"], "uniform_attention": model["uniform_share"]}
        expected |= {"own_attention_at_2x2": shares[1], "own_attention_at_4x4": shares[2]}
        assert found == pytest.approx(expected | {"own_attention_in_block_1": model["own_share_per_block"][0]})
        assert model["images"] == 80, "of 400 a fifth is held out"
    assert all((folder / f"{name}.png").stat().st_size > 1000 for name in ("attention", "figure"))
    stored = {path: path.stat().st_mtime_ns for path in (out / "tiny").glob("run-*/attention.json")}
    assert len(stored) == 2
    assert run("mvar-attention", out) == 0
    assert {path: path.stat().st_mtime_ns for path in stored} == stored


def test_rows_of_dynamic_experts_are_sparsified_once_and_counted(out):
    """Of one trained model; a row of all experts, one at a budget, and the picture of both."""
    assert run("dmoe-maps", out) == 0
    found = {kind: len(list((out / "tiny").glob(f"{kind}-*"))) for kind in ("run", "sparse")}
    assert found == {"run": 1, "sparse": 2}, "tuned once, and once what both rows make of it"
    folder = out / "tiny" / "dmoe-maps"
    everything, budget = json.loads((folder / "results.json").read_text())["rows"]
    assert everything["figures"]["flops_share"]["mean"] == 1
    assert budget["figures"]["flops_share"]["mean"] == pytest.approx(0.8, abs=0.05)
    assert all((folder / f"{name}.png").exists() for name in ("experts", "samples", "figure"))
    assert run("dmoe-times", out) == 0
    assert len(list((out / "tiny").glob("sparse-*"))) == 2, "the same models are timed"
    rows = json.loads((out / "tiny" / "dmoe-times" / "results.json").read_text())["rows"]
    timed = {row["name"]: row["figures"] for row in rows}
    assert list(timed) == ["dense", "calibrated, 80 %", "random experts, 80 %"]
    shares = [figures["flops_share"]["mean"] for figures in timed.values()]
    assert shares == pytest.approx([1, budget["figures"]["flops_share"]["mean"], 0.75], abs=0.06)
    for figures in timed.values():
        assert all(figures[f"seconds_at_{side}x{side}"]["mean"] > 0 for side in (1, 2, 4))


def test_folders_of_models_that_were_tuned_whole_keep_their_names():
    """Earlier versions left out `tune all`, their default: such a folder is not taken for one of `tune late`."""
    names = {tune: compute_key(_list_key_settings(SparsifyConfig(tune=tune, hoyer=0.2))) for tune in ("late", "all")}
    assert names["all"] == compute_key({"hoyer": 0.2})
    assert names["late"] == compute_key({"hoyer": 0.2, "tune": "late"})


def test_a_study_chooses_learning_rates_and_compares_progress(out, capsys):
    """Three rows, each with two candidates for a learning rate and two reported seeds."""
    assert run("study", out) == 0
    said = capsys.readouterr().out
    assert "study: 0 of 12 trainings are done, 0 of 6 models are measured" in said
    tiny, folder = out / "tiny", out / "tiny" / "study"
    runs = {f.parent: json.loads(f.read_text()) for f in tiny.glob("run-*/finished.json")}
    assert len(runs) == 12
    results = json.loads((folder / "results.json").read_text())
    reference, *others = results["rows"]
    for row in results["rows"]:
        candidates = {c["settings"]["run.train.learning_rate"]: c["losses"][0] for c in row["chosen"]["candidates"]}
        assert list(candidates) == [1e-3, 4e-3]
        best = row["chosen"]["settings"]["run.train.learning_rate"]
        assert candidates[best] == min(candidates.values())
        tuned = [f for f in runs.values() if f["settings"]["train"]["seed"] == 100]
        assert {f["validation_loss"] for f in tuned} >= set(candidates.values())
        losses = {f["validation_loss"] for f in runs.values() if f["settings"]["train"]["learning_rate"] == best}
        assert set(row["figures"]["validation_loss"]["values"]) <= losses, "trained with the chosen value"
    for row in others:
        pairs = zip(*(r["figures"]["validation_loss"]["values"] for r in (row, reference)), strict=True)
        assert row["differences"]["validation_loss"]["values"] == pytest.approx([a - b for a, b in pairs])
    check_progress(json.loads((folder / "progress.json").read_text()), tiny)
    assert (folder / "progress.png").stat().st_size > 1000
    table = (folder / "table.md").read_text()
    assert "Chosen for each row by the mean held-out loss of seeds that are not reported (100):" in table
    lines = table[table.index("Training to the final held-out loss of dense, ") :].splitlines()
    assert "| dense | 4 (4 to 4) | 1 (1 to 1) | 1 (1 to 1) | 1 (1 to 1) |" in lines
    assert sum(line.startswith("| guidance, ") for line in lines) == 2
    check_shuffled_features(next(f["settings"]["data"] for f in runs.values() if f["settings"]["loss"]["shuffle"]))
    assert run("study", out) == 0
    said = capsys.readouterr()
    assert "study: 12 of 12 trainings are done, 6 of 6 models are measured\n" in said.out
    assert "training the" not in said.err


def test_the_noise_of_one_training(out, capsys):
    """One training, chosen as in the study, measured with three seeds of sampling; its loss on resampled images."""
    assert run("study-noise", out) == 0
    tiny, folder = out / "tiny", out / "tiny" / "study-noise"
    (path,) = tiny.glob("run-*/noise.json")
    assert len(list(tiny.glob("run-*"))) == 3, "two candidates, and the one that is measured"
    (row,) = json.loads((folder / "results.json").read_text())["rows"]
    assert len(set(row["figures"]["distance"]["values"])) == 3
    assert len(set(row["figures"]["validation_loss"]["values"])) == 1
    assert list(row["noise"])[:4] == ["validation_loss", "nats_1x1", "nats_2x2", "nats_4x4"]
    for metric in ("distance", "score", "precision", "recall"):
        assert row["noise"][metric] == pytest.approx(np.std(row["figures"][metric]["values"], ddof=1))
    losses = compute_losses_by_image(path.parent)
    assert losses.mean(0) == pytest.approx([row["figures"][m]["mean"] for m in list(row["noise"])[:4]], rel=1e-5)
    expected = losses.std(axis=0) / 4  # the deviation of a mean of 16 images
    assert list(row["noise"].values())[:4] == pytest.approx(expected, rel=0.1), "but for the number of resamples"
    table = (folder / "table.md").read_text()
    assert "mean ± standard deviation over seeds of sampling, of one training." in table
    noise = table[table.index("Noise, the standard deviation of each metric of one training") :].splitlines()
    assert noise[2].startswith("|  | validation_loss | nats_1x1 |")
    assert noise[2].endswith("| classifier_fd | classifier_score | classifier_precision | classifier_recall |")
    assert float(noise[4].split(" | ")[1]) == pytest.approx(row["noise"]["validation_loss"], rel=1e-3)
    capsys.readouterr()
    assert run("study-noise", out) == 0
    said = capsys.readouterr()
    assert "study-noise: 3 of 3 trainings are done, 3 of 3 models are measured\n" in said.out
    assert "training the" not in said.err
    assert "seeds       of sampling; each row has one training, with seed 0" in format_experiment(
        load_experiment("study-noise", "tiny")
    )


def compute_losses_by_image(folder):
    """Cross-entropy of the 16 validated images one by one, over all tokens and at each scale."""
    pipeline, losses = Pipeline.from_pretrained(folder, backend="plain"), []
    data = Path(json.loads((folder / "run.json").read_text())["data"])
    examples = TokenCache(data).load_examples("held_out")
    for i in range(16):
        batch = examples.fetch([i], None)
        tokens = batch["tokens"].long()
        with torch.no_grad():
            logits = pipeline.transformer(batch["label"], pipeline.tokenizer.teacher_inputs(tokens)).logits_BNV
        nats = torch.nn.functional.cross_entropy(logits[0], tokens[0], reduction="none").double()
        losses.append([float(part.mean()) for part in (nats, nats[:1], nats[1:5], nats[5:])])
    return np.array(losses)


def check_progress(report, tiny):
    """The steps to the reference's final loss against NumPy's interpolation of the logs."""
    assert report["reference"] == report["rows"][0]["name"] == "dense"
    for row in report["rows"]:
        for seed, (name, first) in enumerate(zip(row["runs"], report["rows"][0]["runs"], strict=True)):
            log, target = (read_validations(tiny / folder) for folder in (name, first))
            assert row["steps"] == [step for step, _ in log]
            assert row["losses"][seed] == [loss for _, loss in log]
            reached = row["to_reference"]["steps_by_seed"][seed]
            fine = np.linspace(1, 4, 30001)
            below = fine[np.interp(fine, *zip(*log, strict=True)) <= target[-1][1]]
            assert (reached is None) == (not len(below))
            if reached is not None:
                assert reached == pytest.approx(below[0], abs=2e-4)
    first = report["rows"][0]["to_reference"]
    assert first["seeds_that_reach_it"] == 2
    assert max(first["steps_share"]["values"]) <= 1
    assert report["rows"][0]["flops_per_step"] < report["rows"][1]["flops_per_step"], "the alignment head costs, too"


def read_validations(folder):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]


def check_shuffled_features(cache):
    """Tokens and labels as they are, the features of another image for each."""
    examples = TokenCache(Path(cache)).load_examples("train")
    indices, positions = list(range(len(examples))), [0] * len(examples)
    plain, shuffled, again = (
        e.fetch(indices, positions) for e in (examples, examples.shuffle_features(3), examples.shuffle_features(3))
    )
    assert torch.equal(plain["tokens"], shuffled["tokens"])
    assert torch.equal(plain["label"], shuffled["label"])
    assert torch.equal(again["features"], shuffled["features"])
    before, after = (batch["features"].flatten(1).numpy() for batch in (plain, shuffled))
    assert not (before == after).all(axis=1).any()
    assert np.array_equal(np.sort(before, axis=0), np.sort(after, axis=0))


def test_figures_over_another_are_lines_by_kind():
    def row(name, share, distance):
        return {"name": name, "figures": {"flops_share": {"mean": share}, "distance": {"mean": distance}}}

    rows = [row("dense", 1.0, 3.0), row("pruned, 90 %", 0.9, 4.0), row("pruned, 80 %", 0.8, 5.0)]
    rows.append({"name": "not measured", "figures": {}})
    found = group_lines("flops_share", rows, ["flops_share", "distance"], "classifier")
    title = "Fréchet distance, classifier's features, lower is better"
    assert found == {title: {"dense": [(100.0, 3.0)], "pruned": [(90.0, 4.0), (80.0, 5.0)]}}


def summarize(*values):
    return {"values": values, "mean": np.mean(values), "deviation": np.std(values, ddof=1)}


def test_columns_that_belong_together_share_a_panel():
    columns = ["active_parameters", "nats_1x1", "distance", "nats_2x3", "load_variance"]
    first = {"active_parameters": summarize(2e6, 2e6), "nats_1x1": summarize(3.0, 3.5), "nats_2x3": summarize(1.0, 1.2)}
    second = {"nats_1x1": summarize(3.25, 3.5), "nats_2x3": summarize(0.5, 0.5), "distance": summarize(30.0, 32.0)}
    rows = [
        {"name": "VAR", "at": None, "published": {"distance": 3.5}, "figures": first},
        {"name": "other", "at": None, "published": {}, "figures": second},
    ]
    results = {"rows": rows, "figures": columns, "features": "classifier", "scale": "cifar"}
    parameters, scales, distance = list_panels(results)
    assert (parameters.title, parameters.lines) == ("Active parameters (millions)", {"": [Point("VAR", 2.0)]})
    assert scales.title == "Held-out loss by scale, less that of VAR (nats per token)"
    assert [(p.x, p.mean) for p in scales.lines["other"]] == [("1x1", 0.125), ("2x3", pytest.approx(-0.6))]
    assert scales.lines["other"][1].deviation == pytest.approx(np.std([-0.5, -0.7], ddof=1)), "seed by seed"
    assert distance.published == {"": [Point("VAR", 3.5)]}
    assert not distance.comparable
    assert list_panels(results | {"scale": "paper", "features": "inception"})[2].comparable
    assert list_panels(results | {"features": "inception"})[2].title == "FID, lower is better"


@pytest.mark.parametrize("name", list_experiments())
def test_columns_are_drawn_under_words(name):
    columns = [c for c in load_experiment(name, "tiny").metrics if c not in GROUPS]
    titles = [describe_column(column, "classifier")[0] for column in columns]
    assert all("_" not in title and title[0].isupper() for title in titles)


@pytest.mark.parametrize("at", [(None, None), (1.0, 2.0)])
def test_a_figure_is_drawn_of_rows_by_name_and_over_numbers(at, tmp_path):
    figures = {"distance": summarize(30.0, 32.0), "nats_1x1": summarize(3.0, 3.5), "load_E1": summarize(8.0, 7.0)}
    published = {"distance": 3.5, "load_E1": 9.0}
    rows = [{"name": f"row {i}", "at": x, "published": published, "figures": figures} for i, x in enumerate(at)]
    draw_results({"rows": rows, "features": "classifier", "scale": "cifar"}, "depth", tmp_path / "figure.png")
    assert np.asarray(Image.open(tmp_path / "figure.png").convert("L")).std() > 10
