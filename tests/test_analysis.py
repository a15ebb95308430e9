"""Looking into models: every figure against a loop over images, blocks and tokens; pictures, JSON, refusals."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.checkpoints.saving import write_checkpoint
from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.analysis import AnalysisConfig, CopiesConfig, ErrorsConfig
from nextscale.config.data import DataConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.data.cache import TokenCache
from nextscale.data.datasets import load_images
from nextscale.evaluation.metrics import neighbours
from nextscale.evaluation.metrics.neighbours import compute_share_of_copies, find_nearest
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.copies import analyse_copies
from nextscale.research.analysis.errors import analyse_errors
from nextscale.research.analysis.features import analyse_features, project_principal
from nextscale.research.analysis.load import analyse_load
from nextscale.research.analysis.pyramid import analyse_pyramid
from nextscale.research.analysis.routing import analyse_routing
from nextscale.sampling.draw import invert_cdf
from nextscale.sampling.filters import filter_top_k_top_p
from nextscale.sampling.guidance import guide_logits
from nextscale.training.tokenize import tokenize
from tests.conftest import randomised, tiny_config
from tests.test_cli import fails
from tests.test_convergence import write_log
from tests.test_random import word_by_loop

CLASSES = tuple("abcde")
SPANS = [(0, 1), (1, 5), (5, 14), (14, 30)]
CONFIG = AnalysisConfig(num=11, batch_size=4)


def save(folder: Path, seed: int = 0, **experts) -> str:
    """A model of 3 blocks and 5 classes, all with the tokenizer of seed 0; dense, or with these experts."""
    settings = {"experts": ExpertsConfig(**experts)} if experts else {}
    pipeline, tokens = randomised(tiny_config(depth=3, **settings), seed), randomised(tiny_config(), 0).tokenizer
    pipeline.tokenizer.load_state_dict(tokens.state_dict())
    checkpoint = pipeline.to_checkpoint()
    checkpoint.config = checkpoint.config.__class__(**(vars(checkpoint.config) | {"class_names": CLASSES}))
    write_checkpoint(folder, checkpoint)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, 60 random pictures of 5 classes, and their token cache, which holds out 15."""
    folder = tmp_path_factory.mktemp("analysis")
    rng = np.random.default_rng(0)
    for i in range(60):
        path = folder / "pictures" / CLASSES[i % 5] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    save(folder / "dense")
    for router in ("stmoe", "smoe", "expert-choice", "moe++"):
        save(folder / router, router=router, count=5, active=2)
    images = DataConfig(held_out=0.25)
    tokenize(str(folder / "pictures"), folder / "dense", folder / "cache", images, 0, World())
    return folder


def held_out_rows(place):
    """Tokens (1, L) and label (1,) of every held-out image that CONFIG takes."""
    examples = TokenCache(place / "cache").load_examples("held_out")
    for i in range(CONFIG.num):
        batch = examples.fetch([i], None)
        yield batch["tokens"].long(), batch["label"]


def one_by_one(place, name: str):
    """The model, and what it gives for every held-out image that CONFIG takes, by itself."""
    pipeline = Pipeline.from_pretrained(place / name)
    for tokens, label in held_out_rows(place):
        with torch.no_grad():
            yield pipeline, pipeline.transformer(label, pipeline.tokenizer.teacher_inputs(tokens))


@pytest.mark.parametrize("router", ["stmoe", "smoe", "expert-choice", "moe++"])
def test_load_counts_every_choice(place, tmp_path, router):
    report = analyse_load([str(place / router)], str(place / "cache"), tmp_path, CONFIG)
    assert report == json.loads((tmp_path / "load.json").read_text())
    assert Image.open(tmp_path / "load.png").size > (300, 300)
    (model,) = report["models"]
    experts = 9 if router == "moe++" else 5
    counts = np.zeros((3, 4, experts), int)
    for pipeline, output in one_by_one(place, router):
        for block, record in enumerate(output.records):
            for position, scale in enumerate(pipeline.config.pyramid.scale_of_L):
                for expert in range(experts):
                    counts[block, scale, expert] += int(record.routing.selected_BNM[0, position, expert])
    assert model["counts"] == counts.tolist()
    total = counts.sum((0, 1))
    assert model["load"] == pytest.approx(64 * total / total.sum())
    assert model["load_variance"] == pytest.approx(statistics.variance(64 * total / total.sum()))
    for block in range(3):
        load = 64 * counts[block].sum(0) / counts[block].sum()
        assert model["load_per_block"][block] == pytest.approx(load)
        assert model["load_variance_per_block"][block] == pytest.approx(statistics.variance(load))
    assert np.sum(model["load_per_scale"], axis=1) == pytest.approx([64] * 4)
    assert model["images"] == 11
    assert model["scales"] == ["1x1", "2x2", "3x3", "4x4"]
    assert model["experts"] == [*(f"E{i}" for i in range(1, 6)), "zero", "copy", "constant 1", "constant 2"][:experts]
    if router == "expert-choice":
        assert model["load_variance"] == 0


def test_load_equals_what_training_measures(place, tmp_path):
    """The same figure that validation logs as expert_load."""
    from nextscale.config.training import TrainConfig
    from nextscale.training.transformer import TransformerTask
    from nextscale.training.validation import validate

    pipeline = Pipeline.from_pretrained(place / "stmoe")
    held_out = TokenCache(place / "cache").load_examples("held_out")
    task = TransformerTask(pipeline.transformer, pipeline.tokenizer, held_out, TrainConfig())
    logged = validate(task, held_out, CONFIG.num, World())["validation_expert_load"]
    (model,) = analyse_load([str(place / "stmoe")], str(place / "cache"), tmp_path, CONFIG)["models"]
    assert model["load"] == pytest.approx(logged, rel=1e-6)


def test_pictures_are_held_out_as_in_training(place, tmp_path):
    """Pictures, split and encoded here, give what their token cache gives; so do other batches, and several models."""
    options = {"num": 0, "images": DataConfig(held_out=0.25)}
    models, names = [str(place / "stmoe"), str(place / "smoe")], ["ST", "S"]
    from_pictures = analyse_load(models, str(place / "pictures"), tmp_path / "a", AnalysisConfig(**options), names)
    assert [m["name"] for m in from_pictures["models"]] == names
    assert from_pictures["models"][0]["images"] == 15
    for model, name in zip(models, names, strict=True):
        config = AnalysisConfig(**options, batch_size=1)
        report = analyse_load([model], str(place / "cache"), tmp_path / name, config, [name])
        assert report["models"][0] == from_pictures["models"][names.index(name)]


@pytest.mark.parametrize("block", [0, 3])
def test_routing_maps_are_shares_of_images(place, tmp_path, block):
    """At every position, and split into what the position decides and what the image decides."""
    report = analyse_routing([str(place / "stmoe")], str(place / "cache"), tmp_path, CONFIG, block=block)
    assert report == json.loads((tmp_path / "routing.json").read_text())
    (model,) = report["models"]
    assert model["block"] == (block or 2)
    chosen = np.stack(
        [out.records[model["block"] - 1].routing.selected_BNM[0].numpy() for *_, out in one_by_one(place, "stmoe")]
    ).astype(float)
    for k, (start, end) in enumerate(SPANS):
        part = chosen[:, start:end]
        for expert in range(5):
            found = np.array(model["maps"][k][expert])
            assert found.shape == (k + 1, k + 1)
            np.testing.assert_allclose(found.ravel(), part[:, :, expert].mean(0))
        assert model["share_per_scale"][k] == pytest.approx(part.mean((0, 1)))
        whole = part.reshape(-1, 5).var(axis=0).mean()
        positions, images = model["variance_between_positions"][k], model["variance_between_images"][k]
        assert positions == pytest.approx(part.mean(0).var(axis=0).mean())
        assert positions + images == pytest.approx(whole)


def test_routing_of_one_image_and_of_a_scale_router(place, tmp_path):
    """One image's maps are its choices; a scale router decides neither by position nor by image."""
    models = [str(place / "stmoe"), str(place / "smoe")]
    report = analyse_routing(models, str(place / "cache"), tmp_path, CONFIG, image=4)
    chosen = [output for *_, output in one_by_one(place, "stmoe")][4].records[1].routing.selected_BNM[0]
    assert report["image"] == 4
    assert np.array(report["models"][0]["maps"][3])[2].ravel().tolist() == chosen[14:30, 2].float().tolist()
    assert report["models"][1]["variance_between_positions"] == [0] * 4
    assert report["models"][1]["variance_between_images"] == [0] * 4
    assert np.asarray(Image.open(tmp_path / "routing.png")).std() > 10


def test_pictures_of_other_aspects(tmp_path):
    """Maps need not be square."""
    from nextscale.research.analysis.figures import plot_map_grids

    maps = [[[[0.5]]], [[[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]]]
    plot_map_grids({"a model": (["E1"], ["1x1", "2x3"], maps, [])}, "share", tmp_path / "maps.png")
    assert Image.open(tmp_path / "maps.png").width > 100


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_features_are_the_outputs_of_the_block(place, tmp_path, projection):
    """Separation of all tokens, and the drawn ones, against arrays taken from the block itself."""
    model, options = str(place / "stmoe"), {"points": 6, "projection": projection}
    report = analyse_features([model], str(place / "cache"), tmp_path, CONFIG, block=2, **options)
    assert report == json.loads((tmp_path / "features.json").read_text())
    found = report["models"][0]
    pipeline, seen = Pipeline.from_pretrained(model), []
    pipeline.transformer.blocks[1].register_forward_hook(lambda block, given, output: seen.append(output[0]))
    for tokens, label in held_out_rows(place):
        with torch.no_grad():
            pipeline.transformer(label, pipeline.tokenizer.teacher_inputs(tokens))
    x = torch.cat(seen).double().numpy()
    scales = [x[:, i:j].reshape(-1, x.shape[-1]) for i, j in SPANS]
    means = np.stack([scale.mean(0) for scale in scales])
    spread = [((scale - mean) ** 2).sum(1).mean() for scale, mean in zip(scales, means, strict=True)]
    between = ((means - means.mean(0)) ** 2).sum(1).mean()
    assert found["variance_between_scales"] == pytest.approx(between / (between + np.mean(spread)), rel=1e-5)
    assert found["spread_per_scale"] == pytest.approx(np.sqrt(spread), rel=1e-4)
    distances = [[np.linalg.norm(a - b) for b in means] for a in means]
    np.testing.assert_allclose(found["distance_between_scales"], distances, rtol=1e-5, atol=1e-5)
    assert [len(points) for points in found["points"]] == [6, 6, 6, 6]
    picks = [torch.randperm(11 * n, generator=make_generator(0, "features", k))[:6].sort().values.numpy()
             for k, n in enumerate([1, 4, 9, 16])]  # fmt: skip
    if projection == "pca":
        chosen = torch.from_numpy(np.concatenate([scale[p] for scale, p in zip(scales, picks, strict=True)]))
        np.testing.assert_allclose(np.concatenate(found["points"]), project_principal(chosen)[0], rtol=1e-3, atol=1e-4)
    again = analyse_features([model], str(place / "cache"), tmp_path, CONFIG, block=2, **options)
    assert again == report
    assert Image.open(tmp_path / "features.png").width > 300


def test_principal_axes_are_those_of_the_singular_values():
    x = np.random.default_rng(0).normal(size=(40, 7)) * np.arange(1, 8) + 3
    points, shares = project_principal(torch.from_numpy(x))
    _, values, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points.numpy()), np.abs((x - x.mean(0)) @ axes[:2].T), atol=1e-9)
    assert shares == pytest.approx((values**2 / (values**2).sum())[:2])
    assert torch.equal(
        project_principal(torch.from_numpy(x).flip(0))[0].flip(0).round(decimals=9), points.round(decimals=9)
    )


def grown(pipeline, label: int, number: int, config: SampleConfig, wrong: dict[int, torch.Tensor] | None = None):
    """Image `number` token by token without cache, loop or batch: all tokens, with those of `wrong` scales given."""
    tokens = torch.zeros(1, 30, dtype=torch.int64)
    for k, (i, j) in enumerate(SPANS):
        inputs = pipeline.tokenizer.teacher_inputs(tokens)
        with torch.no_grad():
            plain, free = (pipeline.transformer(torch.tensor([v]), inputs).logits_BNV[:, i:j] for v in (label, 5))
        likely = filter_top_k_top_p(guide_logits(plain, free, config.cfg * k / 3), config.top_k, config.top_p)
        words = torch.tensor([[word_by_loop(config.seed, "token", number, 0, cell) for cell in range(i, j)]])
        tokens[:, i:j] = invert_cdf(likely, words)
        if wrong and k in wrong:
            tokens[:, i:j] = wrong[k]
    return tokens


def test_errors_are_injected_at_their_scale_and_drawn_on(place, tmp_path):
    """Against images grown one by one by teacher forcing; labels in turn, another image for comparison."""
    config = ErrorsConfig(num=3, scales=(3, 2, 3), share=0.5, batch_size=2, shown=2)
    sampling = SampleConfig(cfg=2.0, top_k=20, top_p=0.9, seed=7)
    report = analyse_errors([str(place / "stmoe")], tmp_path, config, sampling, ["ST"], labels=["b", None])
    assert report == json.loads((tmp_path / "errors.json").read_text())
    (model,) = report["models"]
    pipeline, labels = Pipeline.from_pretrained(place / "stmoe"), [1, 5, 1]
    clean = [grown(pipeline, label, i, sampling) for i, label in enumerate(labels)]
    images = [pipeline.tokenizer.decode(tokens) for tokens in clean]
    for error, s in zip(model["errors"], (1, 2), strict=True):
        (start, end), changed, far, kept = SPANS[s], [], [], []
        for i, label in enumerate(labels):
            rng = make_generator(7, "error", i, s)
            count = (end - start) // 2
            cells = torch.randperm(end - start, generator=rng)[:count]
            wrong = clean[i].clone()
            wrong[0, start + cells] = (wrong[0, start + cells] + torch.randint(1, 32, (count,), generator=rng)) % 32
            tokens = grown(pipeline, label, i, sampling, {s: wrong[:, start:end]})
            changed.append([(tokens != clean[i])[0, a:b].float().mean() for a, b in SPANS])
            for out, other in ((far, tokens), (kept, wrong)):
                out.append(((pipeline.tokenizer.decode(other) - images[i]) / 2).square().mean().sqrt())
        assert error["scale"] == s + 1
        assert error["tokens_changed"] == pytest.approx(np.mean(changed, axis=0))
        assert error["tokens_changed"][:s] == [0] * s
        assert error["tokens_changed"][s] == pytest.approx(count / (end - start))
        assert max(error["tokens_changed"][s + 1 :]) > 0
        assert error["canvas_distance"][:s] == [0] * s
        assert error["image_distance"] == pytest.approx(np.mean(far), rel=1e-4)
        assert error["image_distance_deviation"] == pytest.approx(np.std(far, ddof=1), rel=1e-3)
        assert error["kept_image_distance"] == pytest.approx(np.mean(kept), rel=1e-4)
    others = [pipeline.tokenizer.decode(grown(pipeline, label, 3 + i, sampling)) for i, label in enumerate(labels)]
    far = [((a - b) / 2).square().mean().sqrt() for a, b in zip(others, images, strict=True)]
    assert model["another_image"]["image_distance"] == pytest.approx(np.mean(far), rel=1e-4)
    assert all(Image.open(tmp_path / name).width > 300 for name in ("errors.png", "distance.png"))


def test_errors_do_not_depend_on_the_batch_and_know_no_other_sampling(place, tmp_path):
    options = {"num": 3}
    reports = [
        analyse_errors([str(place / "dense")], tmp_path, ErrorsConfig(**options, batch_size=b))["models"]
        for b in (1, 3)
    ]
    assert reports[0] == reports[1]
    assert [error["scale"] for error in reports[0][0]["errors"]] == [1, 2, 3]
    for bad in ({"smooth": True}, {"official_seeding": True}, {"draft_scales": 1}, {"refiner": "r"}):
        with pytest.raises(UserError, match="without official_seeding, smooth and a refiner"):
            analyse_errors([str(place / "dense")], tmp_path, ErrorsConfig(**options), SampleConfig(**bad))


def test_pyramid_says_what_is_left_after_each_scale(place, tmp_path):
    """Against a loop over positions and channels, with the features and canvases of the tokenizer."""
    paths = sorted((place / "pictures").rglob("*.png"))[:3]
    report = analyse_pyramid(str(place / "dense"), paths, tmp_path, num=2)
    assert report == json.loads((tmp_path / "pyramid.json").read_text())
    assert [image["image"] for image in report["images"]] == [str(path) for path in paths[:2]]
    pipeline = Pipeline.from_pretrained(place / "dense")
    for path, image in zip(paths, report["images"], strict=False):
        pixels = np.asarray(Image.open(path), np.float64)  # as large as the model's images
        (tokens_L,) = pipeline.encode(str(path)).tolist()
        assert [t for rows in image["tokens"] for row in rows for t in row] == tokens_L
        assert [(len(rows), len(rows[0])) for rows in image["tokens"]] == list(pipeline.config.pyramid.sides)
        shown = pipeline.reconstruct(str(path)).tensor[0].permute(1, 2, 0).numpy() * 255
        db = -10 * np.log10(np.mean((shown - pixels) ** 2) / 255**2)
        assert image["psnr_db"][-1] == pytest.approx(db, abs=1e-3)
        with torch.no_grad():
            x = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
            features = pipeline.tokenizer.extract_features(x)[0].tolist()
            canvases = [c[0].tolist() for c in pipeline.tokenizer.build_canvases(torch.tensor([tokens_L]))]
        for canvas, left in zip(canvases, image["left"], strict=True):
            squares, rest = 0.0, 0.0
            for channel, drawn in zip(features, canvas, strict=True):
                for row, drawn_row in zip(channel, drawn, strict=True):
                    for value, other in zip(row, drawn_row, strict=True):
                        squares, rest = squares + value**2, rest + (value - other) ** 2
            assert left == pytest.approx(rest / squares, rel=1e-4)


def test_the_nearest_images_by_brute_force():
    rng = np.random.default_rng(0)
    references, images = rng.integers(0, 256, (70, 3, 4, 5), dtype=np.uint8), rng.random((9, 3, 4, 5), dtype=np.float32)
    images[3] = references[61] / 255
    exact = np.array([[np.sqrt(np.mean((i - r / 255.0) ** 2)) for r in references] for i in images])
    for chunk in (1, 16, 8192):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neighbours, "_CHUNK", chunk)
            distances, index = find_nearest(torch.from_numpy(images), torch.from_numpy(references), 3)
        assert (index.numpy() == exact.argsort(axis=1)[:, :3]).all()
        np.testing.assert_allclose(distances.numpy(), np.sort(exact, axis=1)[:, :3], rtol=1e-5, atol=1e-7)
    assert distances[3, 0] == 0
    assert find_nearest(torch.from_numpy(images), torch.from_numpy(references[:2]), 3)[1].shape == (9, 2)
    assert compute_share_of_copies(torch.tensor([0.0, 0.2, 1.0]), torch.linspace(0.3, 1, 50)) == pytest.approx(2 / 3)


def test_a_model_that_gives_its_training_images_is_seen_to_copy(place, tmp_path):
    """What a model was trained on is, in one case, what it samples; in the other, other pictures."""
    sampling, config = SampleConfig(cfg=0.0, seed=3), CopiesConfig(num=10, shown=4, batch_size=3)
    samples = Pipeline.from_pretrained(str(place / "dense")).sample([i % 5 for i in range(10)], sampling)
    for i, picture in enumerate(samples.pil()):
        path = tmp_path / "own" / CLASSES[i % 5] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    pictures, out = str(place / "pictures"), tmp_path / "out"
    report = analyse_copies(str(place / "dense"), str(tmp_path / "own"), pictures, out, config, sampling)
    assert report == json.loads((out / "copies.json").read_text())
    assert report["share_of_copies"] == 1
    assert report["distance"]["samples"]["95 %"] < 0.5 / 255 < 0.1 < report["distance"]["held_out"]["smallest"]
    own = load_images(str(tmp_path / "own"), 8).images_B3HW
    for pair in report["nearest_pairs"]:
        same = (samples.tensor[pair["sample"]] * 255).round().to(torch.uint8)
        assert torch.equal(own[pair["training_image"]], same)
    assert Image.open(out / "copies.png").width > 500
    report = analyse_copies(str(place / "dense"), pictures, str(tmp_path / "own"), out, config, sampling)
    assert report["distance"]["samples"] == pytest.approx(report["distance"]["held_out"], abs=0.5 / 255)
    with pytest.raises(UserError, match="have other classes: give images of one data set"):
        analyse_copies(str(place / "dense"), pictures, "digits", out, config, sampling)


def test_every_analysis_through_the_command_line(place, tmp_path, capsys):
    cache, few = ["--data", place / "cache"], ["--num", 3]
    models = [place / "stmoe", place / "smoe"]
    run = write_log(tmp_path / "run", {10: 5.0, 20: 4.0})
    picture = min((place / "pictures").rglob("*.png"))
    commands = {
        "pyramid": [place / "dense", picture],
        "load": [*models, *cache, *few],
        "routing": [*models, *cache, *few, "--image", 1],
        "features": [place / "dense", *models, *cache, *few, "--points", 5],
        "errors": [place / "dense", *few, "--labels", "a,none", "--scales", 1, 2, "--cfg", 1, "--share", 0.3],
        "convergence": [run],
        "copies": [place / "dense", "--data", place / "pictures", "--held-out", place / "pictures", *few],
    }
    for name, options in commands.items():
        out = tmp_path / name
        assert main(["analyse", name, *map(str, options), "--out", str(out)]) == 0, name
        assert f"see {out}/{name}.png" in capsys.readouterr().out
        assert json.loads((out / f"{name}.json").read_text())["analysis"] == name
        assert (out / f"{name}.png").exists()


@pytest.mark.parametrize("analysis", ["load", "routing"])
def test_what_cannot_be_analysed_is_named(place, tmp_path, capsys, analysis):
    out, cache = ["--out", tmp_path], ["--data", place / "cache"]
    said = fails(capsys, "analyse", analysis, place / "dense", *cache, *out)
    assert "dense is a dense model: it has no experts; give a mixture of experts" in said
    said = fails(capsys, "analyse", analysis, place / "stmoe", "--data", "digits", *out, "--images.limit", "50")
    assert "only digits has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; only stmoe has a, b, c, d, e (of 10 and 5)" in said
    same = [place / "stmoe", place / "smoe", "--names", "A", "A"]
    assert "models must have different names; got A, A" in fails(capsys, "analyse", analysis, *same, *cache, *out)
    said = fails(capsys, "analyse", analysis, place / "stmoe", "--names", "A", "B", *cache, *out)
    assert "--names must name each of the 1 folders; got 2 names" in said
    assert "num must be 0 (all) or more" in fails(
        capsys, "analyse", analysis, place / "stmoe", *cache, *out, "--num=-1"
    )
    said = fails(capsys, "analyse", analysis, place / "nowhere", *cache, *out)
    assert "nowhere" in said
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scales", 5], "dense has scales 1 to 4; there is no scale 5"),
        (["--share", 0], "share must lie above 0, up to 1"),
        (["--labels", "z"], "there is no class named 'z'"),
        (["--num", 0], "num must be 1 or more"),
        (["--names", "A", "B"], "--names must name each of the 1 folders; got 2 names"),
    ],
)
def test_errors_that_cannot_be_injected(place, tmp_path, capsys, options, said):
    assert said in fails(capsys, "analyse", "errors", place / "dense", "--out", tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_blocks_images_and_caches_that_are_not_there(place, tmp_path, capsys):
    command = ["analyse", "routing", place / "stmoe", "--data", place / "cache", "--out", tmp_path]
    assert "stmoe has blocks 1 to 3; there is no block 4" in fails(capsys, *command, "--block", 4)
    assert "there is no image 15: held-out images are numbered 0 to 14" in fails(capsys, *command, "--image", 15)
    head = json.loads((place / "cache" / "cache.json").read_text())
    del head["digest"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "cache.json").write_text(json.dumps(head | {"examples": {"train": 0, "held_out": 0}}))
    with pytest.raises(UserError, match="holds out no images"):
        analyse_load([str(place / "stmoe")], str(empty), tmp_path, CONFIG)
    (empty / "cache.json").write_text(json.dumps(head | {"tokenizer": "another"}))
    with pytest.raises(UserError, match="was made by another tokenizer"):
        analyse_load([str(place / "stmoe")], str(empty), tmp_path, CONFIG)
