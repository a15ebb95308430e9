"""`nextscale tune`: the search against tables of known numbers, the command on a small model, stops, refusals."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.pictures import to_uint8
from nextscale.common.rng import make_generator
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.profile import read_profile
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig
from nextscale.config.tune import TuneConfig, parse_duration, parse_share
from nextscale.data.parts import choose_part
from nextscale.encoders.classifier import Classifier
from nextscale.encoders.load import load_feature_network
from nextscale.evaluation.images import StoredImages
from nextscale.evaluation.metrics.frechet import Moments, compute_influence, frechet_distance
from nextscale.evaluation.metrics.paired import PairedLoss, compare_distances
from nextscale.evaluation.run import evaluate, make_statistics
from nextscale.sampling.guidance import count_sequences, schedule_guidance
from nextscale.tune import measure
from nextscale.tune.options import DENSE, Candidate, Option, combine_options, list_options
from nextscale.tune.search import FINALISTS, Search, expect_saving
from tests.conftest import randomised, tiny_config

# ---- the search


@dataclass
class Table:
    """Measures candidates by tables of the options' speeds and losses, which multiply, with noise of known size."""

    speeds: dict[str, float]
    losses: dict[str, float]
    noise: float = 0.0
    shard: int = 100
    cost: float = 1.0
    """Seconds of a shard."""
    seconds: float = 0.0
    refuses: tuple[str, ...] = ()
    shards: dict[tuple[str, bool], int] = field(default_factory=dict)

    def check(self, candidate):
        if {option.name for option in candidate.options} == set(self.refuses):
            raise UserError("the model refuses this")

    def measure_speed(self, candidate, rounds, held_out=False):
        return float(np.prod([self.speeds[option.name] for option in candidate.options]))

    def true_loss(self, candidate):
        return float(np.prod([1 + self.losses[option.name] for option in candidate.options])) - 1

    def measure_loss(self, candidate, images, held_out=False):
        done = self.shards.get((candidate.name, held_out), 0)
        self.seconds += self.cost * (images // self.shard - done)
        self.shards[candidate.name, held_out] = images // self.shard
        error = self.noise / images**0.5
        rng = np.random.default_rng(sum(map(ord, candidate.name)) * 1000 + images + held_out)
        return PairedLoss(1 + self.true_loss(candidate) + error * rng.normal(), 1.0, error, images)


def make_options(sizes):
    return [Option(f"axis {a}", f"{a}{b}") for a, size in enumerate(sizes) for b in range(size)]


def find_best(table, candidates, max_loss):
    """By brute force over the true numbers: the fastest candidate that loses little enough."""
    admissible = [c for c in candidates if table.true_loss(c) <= max_loss]
    return max(admissible, key=lambda c: table.measure_speed(c, 1), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_what_brute_force_finds_where_nothing_is_noisy(seed):
    rng = np.random.default_rng(seed)
    options = make_options((3, 4, 3))
    table = Table(
        {option.name: rng.uniform(1.05, 2) for option in options}, {o.name: rng.normal(0.02, 0.05) for o in options}
    )
    candidates = combine_options(options, SampleConfig())
    assert len(candidates) == 4 * 5 * 4 - 1
    found = Search(table, 0.01, 10_000).run(options, candidates)
    best = find_best(table, candidates, 0.01)
    assert (found.winner.candidate if found.winner else None) == best


def test_with_noise_the_winner_keeps_the_bound_and_is_nearly_the_best():
    """Over many tables: a loss above the bound wins in at most 5 % of them; the saving is close to the best one."""
    wrong, shares = 0, []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        options = make_options((2, 4, 2))
        table = Table(
            {option.name: rng.uniform(1.0, 1.8) for option in options},
            {option.name: rng.normal(0.01, 0.06) for option in options}, noise=0.5,
        )  # fmt: skip
        candidates = combine_options(options, SampleConfig())
        found, best = Search(table, 0.01, 800).run(options, candidates), find_best(table, candidates, 0.01)
        assert table.seconds <= 900
        if found.winner is not None:
            wrong += table.true_loss(found.winner.candidate) > 0.01
        if best is not None:
            speed = found.winner.speed if found.winner else 1.0
            shares.append((1 - 1 / speed) / (1 - 1 / table.measure_speed(best, 1)))
    assert wrong <= 1
    assert np.mean(shares) > 0.85


def test_successive_halving_measures_fewer_candidates_on_more_images():
    rng = np.random.default_rng(0)
    options = make_options((6, 9, 6))
    speeds = {option.name: rng.uniform(1.1, 2) for option in options}
    table = Table(speeds, {option.name: rng.normal(0, 0.02) for option in options}, noise=0.3)
    found = Search(table, 0.01, 3000).run(options, combine_options(options, SampleConfig()))
    by_rung = {rung: [r for r in found.results if r.rung >= rung] for rung in range(1, 5)}
    sizes = [len(results) for results in by_rung.values() if results]
    assert sizes[0] == 16
    assert all(later == -(-earlier // 2) for earlier, later in pairwise(sizes)), sizes
    images = [min(r.loss.images for r in results) for results in by_rung.values() if results]
    assert images == sorted(set(images)), "survivors have more"
    assert len(found.finalists) == FINALISTS
    assert {r.held_out.images for r in found.finalists} == {max(r.held_out.images for r in found.finalists)}
    assert table.seconds <= 3000


def test_a_time_that_is_too_short_still_measures_each_stage_once():
    options = make_options((2, 2))
    table = Table({o.name: 1.5 for o in options}, {o.name: -0.1 for o in options}, cost=100.0)
    found = Search(table, 0.01, 1).run(options, combine_options(options, SampleConfig()))
    assert found.winner is not None
    assert {count for (_, held_out), count in table.shards.items() if held_out} == {1}


def test_nothing_wins_where_nothing_is_faster_or_good_enough():
    options = make_options((2, 2))
    slow = Table({o.name: 0.9 for o in options}, {o.name: -0.1 for o in options})
    found = Search(slow, 0.01, 1000).run(options, combine_options(options, SampleConfig()))
    assert (found.winner, found.finalists) == (None, [])
    bad = Table({o.name: 1.5 for o in options}, {o.name: 0.2 for o in options}, noise=0.1)
    found = Search(bad, 0.01, 1000).run(options, combine_options(options, SampleConfig()))
    assert found.winner is None
    assert all(r.held_out.bound() > 0.01 for r in found.finalists)


def test_refused_candidates_are_named_and_do_not_stop_the_search():
    options = make_options((1, 1))
    table = Table({o.name: 1.5 for o in options}, {o.name: -0.1 for o in options}, refuses=("00", "10"))
    found = Search(table, 0.01, 1000).run(options, combine_options(options, SampleConfig()))
    assert found.refused == {"00, 10": "the model refuses this"}
    assert found.winner.candidate.name in ("00", "10")


def test_expected_savings():
    assert expect_saving(2, 0.0, 0.0, 0.01) == 0.5
    assert expect_saving(2, 0.02, 0.0, 0.01) == 0
    assert expect_saving(4, 0.01, 0.02, 0.01) == pytest.approx(0.75 / 2)
    assert expect_saving(0.5, 0.0, 0.0, 0.01) == -1


# ---- the statistics


def test_influence_is_what_leaving_out_one_row_changes():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=rng) @ torch.randn(4, 4, generator=rng) + 0.3
    other = torch.randn(90, 4, generator=rng)
    moments, reference = Moments.compute(x, "x"), Moments.compute(other, "other")
    influence = compute_influence(x, moments, reference)
    rest = [frechet_distance(Moments.compute(torch.cat([x[:i], x[i + 1 :]]), "x"), reference) for i in range(200)]
    jackknife = -199 * (torch.tensor(rest) - sum(rest) / 200)
    assert float(influence.mean()) == pytest.approx(0, abs=1e-9)
    assert float((influence - jackknife).abs().max()) < 0.05 * float(jackknife.abs().max())
    assert float(influence.std()) == pytest.approx(float(jackknife.std()), rel=0.02)


def test_the_standard_error_of_a_paired_loss_is_its_spread():
    """Over many draws of both models' images and of the reference; pairs share most of their randomness."""
    rng = torch.Generator().manual_seed(0)
    mix, losses, errors = torch.eye(8) + 0.3 * torch.randn(8, 8, generator=rng), [], []
    for _ in range(150):
        z, noise = (torch.randn(250, 8, generator=rng) for _ in range(2))
        base = z @ mix + 0.2
        loss = compare_distances(1.02 * base + 0.1 * noise, base, torch.randn(400, 8, generator=rng))
        losses.append(loss.loss)
        errors.append(loss.error)
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.2)
    assert PairedLoss(1.1, 1.0, 0.02, 10).bound() == pytest.approx(0.1 + 1.6449 * 0.02, rel=1e-4)


def test_distances_are_not_compared_without_pairs():
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="pairs of images are compared; got 8 and 7 images"):
        compare_distances(x, x[:7], x)
    with pytest.raises(UserError, match="the baseline has a Fréchet distance of 0"):
        compare_distances(x + 1, x, x)


# ---- options


def test_options_fit_the_model():
    config, settings = tiny_config("1,2,3,4"), SampleConfig(cfg=2.0)
    options = list_options(config, schedule_guidance(settings, config.pyramid), settings)
    assert {option.axis for option in options} == {"type", "guidance", "tokens"}
    for option in options:
        changed = Candidate((option,)).change(settings)
        if option.axis == "guidance":
            strengths = schedule_guidance(changed, config.pyramid)
            assert count_sequences(strengths)[-1] == 1, "guidance ends early"
            assert all(s == 0 or s > own - 1e-4 for s, own in zip(strengths, (0, 0.6667, 1.3333, 2), strict=True))
    unguided = SampleConfig(cfg=0.0)
    options = list_options(config, schedule_guidance(unguided, config.pyramid), unguided)
    assert "guidance" not in {option.axis for option in options}
    refined = replace(settings, refiner="small")
    axes = [option.axis for option in list_options(config, (0, 1, 1, 1), refined)]
    assert axes.count("refiner") == 3
    dynamic = tiny_config(dynamic=DynamicConfig(experts=4, scales=2, router_width=8, router_fingerprint="x"))
    names = [o.name for o in list_options(dynamic, (0,) * 4, settings, (0.9, 0.8)) if o.axis == "experts"]
    assert names == ["experts at 90% of the FLOPs", "experts at 80% of the FLOPs"]


def test_combinations_that_exclude_one_another_are_left_out():
    settings = SampleConfig(refiner="small")
    options = [Option("tokens", "prune", {"prune": (0.5,)}), Option("refiner", "code", {"draft_scales": 2})]
    assert [c.name for c in combine_options(options, settings)] == ["code", "prune"]
    assert DENSE.change(settings) == settings


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2h", 7200), ("45", 45), (".5m", 30)]
)
def test_durations(text, seconds):
    assert parse_duration("--time", text) == seconds


def test_shares():
    assert (parse_share("--max-loss", "1%"), parse_share("--max-loss", "0.02")) == (0.01, 0.02)
    for text in ("", "x", "-1%", "1%%"):
        with pytest.raises(UserError, match="--max-loss takes a share"):
            parse_share("--max-loss", text)
    for text in ("", "5x", "m", "-3m", "1 m"):
        with pytest.raises(UserError, match="--time takes a time"):
            parse_duration("--time", text)


# ---- the command


class FixedTimes(measure.ModelMeasurer):
    """Measures as always, but every time is a function of the settings, so that two searches decide alike.

    `stop`: interrupt as by Ctrl-C, once so many measurements are stored.
    """

    stop = 10**9

    def _read_clock(self):
        self.ticks = getattr(self, "ticks", 0) + 1
        return float(self.ticks)

    def _time_rounds(self, candidate, rounds):
        return [(2.0, 1.0 + zlib.crc32(candidate.name.encode()) % 90 / 100)] * rounds

    def _extract(self, images, folder, shard, show=False):
        if len(self.journal) >= self.stop:
            raise KeyboardInterrupt
        return super()._extract(images, folder, shard, show)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model of 8 pixels, a classifier and 60 reference pictures of the model's classes."""
    folder = tmp_path_factory.mktemp("tune")
    torch.manual_seed(0)
    randomised(tiny_config("1,2,4", depth=1)).save_pretrained(folder / "model")
    Classifier(ClassifierConfig(8, (8, 8), 4), tuple("abcde")).save(folder / "classifier")
    rng = np.random.default_rng(0)
    for i in range(60):
        target = folder / "real" / "abcde"[i % 5]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(target / f"{i:03d}.png")
    return folder


@pytest.fixture
def place(places, tmp_path):
    shutil.copytree(places, tmp_path / "place")
    return tmp_path / "place"


def command(place, *more):
    words = ["tune", place / "model", "--reference", place / "real", "--features", place / "classifier", "--cfg", "2"]
    words += ["--time", "40s", "--shard", "20", "--batch-size", "2", "--device", "cpu", "--max-loss", "60%", *more]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def tuned(places, tmp_path_factory):
    """The folder after a whole search."""
    folder = tmp_path_factory.mktemp("tuned") / "place"
    shutil.copytree(places, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextscale.tune.run.ModelMeasurer", FixedTimes)
        assert main(command(folder)) == 0
    return folder


def read_report(folder):
    return json.loads((folder / "model.tune" / "results.json").read_text())


def test_the_command_leaves_results_and_a_profile(tuned, capsys):
    out, report = tuned / "model.tune", read_report(tuned)
    rows = {row["name"]: row for row in report["rows"]}
    assert {"bfloat16", "no guidance"} <= set(rows)
    finalists = [row for row in rows.values() if "held_out" in row]
    assert len(finalists) == 3
    for row in finalists:
        for half in ("selection", "held_out"):
            found = row[half]
            assert found["loss"] == pytest.approx(found["distance"] / found["distance_dense"] - 1)
            assert found["loss_at_most"] > found["loss"]
            assert found["times_as_fast"] == pytest.approx(2 / found["seconds_per_image"] / 2)
        assert row["held_out"]["loss_at_most_of_all_finalists"] > row["held_out"]["loss_at_most"]
    admissible = [r for r in finalists if r["held_out"]["loss_at_most_of_all_finalists"] <= 0.6]
    assert report["winner"] == max(admissible, key=lambda r: r["held_out"]["times_as_fast"])["name"]
    table = (out / "table.md").read_text()
    assert all(name in table for name in rows)
    assert Image.open(out / "samples.png").width > 8 * 72
    assert Image.open(out / "pareto.png").width > 500
    profile = read_profile(tuned / "model", "fast")
    row = rows[report["winner"]]
    assert profile.measured.loss_at_most == row["held_out"]["loss_at_most"]
    assert profile.dtype == row["dtype"]
    assert to_dict(profile.settings) == to_dict(SampleConfig(cfg=2.0)) | row["sampling"]


def test_reported_distances_are_those_of_evaluate(tuned, tmp_path):
    """A finalist's distances on both halves, against `nextscale evaluate` with the halves as folders."""
    row = next(row for row in read_report(tuned)["rows"] if "held_out" in row)
    stored = StoredImages(str(tuned / "real"))
    half = set(choose_part(60, 30, stored.labels()).tolist())
    files = [tuned / "real" / stored.source.read(i)[0] for i in range(60)]
    for seed, name in enumerate(("selection", "held_out")):
        for i, file in enumerate(files):
            if (i in half) == (name == "selection"):
                (tmp_path / name).mkdir(exist_ok=True)
                shutil.copy(file, tmp_path / name)
        settings = from_dict(SampleConfig, {"cfg": 2.0} | row["sampling"] | {"seed": seed})
        config = EvaluationConfig(count=row[name]["images"], sampling=settings, dtype=row["dtype"])
        report = evaluate(
            str(tuned / "model"), tmp_path / "r.json", [str(tuned / "classifier")], [str(tmp_path / name)], config,
            World(),
        )  # fmt: skip
        assert row[name]["distance"] == pytest.approx(report["measures"]["classifier"]["classifier_fd"], rel=1e-5)


def test_a_finished_search_is_repeated_from_what_is_stored(tuned, monkeypatch, capsys):
    """Nothing is measured again, and the results are the same to the last digit."""
    out = tuned / "model.tune"
    features = {p: p.stat().st_mtime_ns for p in out.rglob("features-*")}
    tables = {p: p.read_bytes() for p in (out / "results.json", out / "table.md", out / measure.JOURNAL)}
    monkeypatch.setattr("nextscale.tune.run.ModelMeasurer", FixedTimes)
    monkeypatch.setattr(FixedTimes, "_time_rounds", None)
    assert main(command(tuned)) == 0
    assert features == {p: p.stat().st_mtime_ns for p in out.rglob("features-*")}
    assert tables == {p: p.read_bytes() for p in tables}


def test_an_interrupted_search_goes_on_and_ends_as_an_uninterrupted_one(place, tuned, monkeypatch, capsys):
    monkeypatch.setattr("nextscale.tune.run.ModelMeasurer", FixedTimes)
    whole = json.loads((tuned / "model.tune" / measure.JOURNAL).read_text())["measurements"]
    monkeypatch.setattr(FixedTimes, "stop", len(whole) - 9)
    assert main(command(place)) == 130
    assert "model.tune; the same command goes on from there" in capsys.readouterr().err
    kept = json.loads((place / "model.tune" / measure.JOURNAL).read_text())["measurements"]
    assert list(kept) == list(whole)[: len(kept)]
    assert len(kept) < len(whole)
    assert not (place / "model" / "profiles").exists()
    monkeypatch.setattr(FixedTimes, "stop", 10**9)
    assert main(command(place)) == 0
    report, expected = read_report(place), read_report(tuned)
    assert report["rows"] == expected["rows"]
    assert report["winner"] == expected["winner"]
    assert json.loads((place / "model.tune" / measure.JOURNAL).read_text())["measurements"] == whole


def test_times_alternate_with_the_dense_model_and_are_kept(place):
    network = load_feature_network(str(place / "classifier"))
    images = StoredImages(str(place / "real"), 8)
    settings, config, folder = SampleConfig(cfg=2.0), TuneConfig(batch=2, shard=20), place / "out"
    model = str(place / "model")
    first = measure.ModelMeasurer(model, network, images, settings, config, folder, torch.device("cpu"))
    candidate = Candidate((Option("guidance", "none", {"cfg": 0.0}),))
    speed = first.measure_speed(candidate, 3)
    assert first.measure_speed(candidate, 3) == speed
    first.measure_speed(candidate, 5)
    rounds = first.rounds[candidate.name, False]
    assert len(rounds) == 5
    assert speed == np.median([dense / own for dense, own in rounds[:3]])
    assert first.measure_speed(candidate, 2, held_out=True) == np.median(
        [dense / own for dense, own in first.rounds[candidate.name, True]]
    )
    again = measure.ModelMeasurer(model, network, images, settings, config, folder, torch.device("cpu"))
    assert again.measure_speed(candidate, 3) == speed
    assert again.seconds > 0


def fails(capsys, words):
    capsys.readouterr()
    assert main(words) == 2, words
    return capsys.readouterr().err


def test_other_inputs_than_the_folder_was_made_of_are_refused(tuned, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "place", copy_function=shutil.copy2)
    words = command(tmp_path / "place")
    assert "holds a run with other settings: shard was 20, now 30" in fails(capsys, [*words, "--shard", "30"])
    assert "sampling.cfg was 2.0, now 1.0" in fails(capsys, [*words, "--cfg", "1"])
    randomised(tiny_config("1,2,4", depth=1), seed=1).save_pretrained(tmp_path / "place" / "model")
    assert "was made of other inputs: model was" in fails(capsys, words)


def test_what_cannot_be_tuned_is_refused(place, capsys):
    words = command(place)
    for option, value in (("--prune", "0.5"), ("--cfg-scales", "2"), ("--draft-scales", "2"), ("--budget", "0.8")):
        assert f"{option} is one of the settings that tune chooses" in fails(capsys, [*words, option, value])
    assert "depend on its batch" in fails(capsys, [*words, "--official-seeding"])
    assert "--time takes a time" in fails(capsys, [*words, "--time", "soon"])
    assert "--max-loss must lie in 0 to 1" in fails(capsys, [*words, "--max-loss", "200%"])
    assert "is no name for a profile" in fails(capsys, [*words, "--name", "../x"])
    assert "tune divides the reference into two halves" in fails(capsys, [*words, "--reference", statistics(place)])
    assert "is a model: give images" in fails(capsys, [*words, "--reference", str(place / "model")])
    assert "writes a profile into the model's folder" in fails(capsys, ["tune", "owner/name", *words[2:]])
    (place / "mine").mkdir()
    (place / "mine" / "notes.csv").write_text("1")
    assert "holds other files (notes.csv)" in fails(capsys, [*words, "--out", str(place / "mine")])
    assert not (place / "model.tune").exists()


def statistics(place):
    path = place / "statistics.npz"
    make_statistics(str(place / "real"), str(place / "classifier"), path, EvaluationConfig(), World())
    return str(path)


def test_a_damaged_journal_is_refused(tuned, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "place", copy_function=shutil.copy2)
    path = tmp_path / "place" / "model.tune" / measure.JOURNAL
    text = path.read_text()
    path.write_text(text.replace('"distance": ', '"distance": 1', 1))
    assert "does not match the digest" in fails(capsys, command(tmp_path / "place"))
    path.write_text(text.replace('"seconds"', '"secunds"', 1))
    assert "has no setting 'secunds'; did you mean 'seconds'?" in fails(capsys, command(tmp_path / "place"))


def test_settings_that_a_model_refuses_are_reported_with_the_reason(places, tmp_path):
    """Numbers beyond float16's range; a refiner that is not given."""
    pipeline = randomised(tiny_config("1,2,4", depth=1))
    pipeline.transformer.word_embed.weight.data.mul_(1e5)
    pipeline.save_pretrained(tmp_path / "large")
    network, images = load_feature_network(str(places / "classifier")), StoredImages(str(places / "real"), 8)
    arguments = network, images, SampleConfig(cfg=0.0), TuneConfig(batch=2, shard=20), tmp_path, torch.device("cpu")
    measurer = measure.ModelMeasurer(str(tmp_path / "large"), *arguments)
    measurer.check(DENSE)
    with pytest.raises(UserError, match="finite"):
        measurer.check(Candidate((Option("type", "float16", dtype="float16"),)))
    with pytest.raises(UserError, match="draft_scales needs a refiner"):
        measurer.check(Candidate((Option("refiner", "refiner", {"draft_scales": 1}),)))


def test_of_more_classes_than_a_shard_has_images_the_first_are_drawn(places, tmp_path):
    """Five classes, two images at once: the images are of classes in an order that is drawn, the same for all."""
    network, images = load_feature_network(str(places / "classifier")), StoredImages(str(places / "real"), 8)
    model, settings, config = str(places / "model"), SampleConfig(cfg=1.0, seed=4), TuneConfig(batch=2, shard=2)
    measurer = measure.ModelMeasurer(model, network, images, settings, config, tmp_path, torch.device("cpu"))
    drawn = torch.randperm(5, generator=make_generator(0, "classes")).tolist()
    assert drawn != [0, 1, 2, 3, 4]
    for held_out in (False, True):
        found = measurer.extract(DENSE, 4, held_out)
        expected = measurer.load("float32").sample(drawn[:4], settings, seed=4 + held_out)
        torch.testing.assert_close(found, network(to_uint8(expected.tensor)).pool_BD.detach())
    assert torch.equal(measurer.extract(DENSE, 2, False), measurer.extract(DENSE, 4, False)[:2])
