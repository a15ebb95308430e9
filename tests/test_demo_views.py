"""What the tabs Edit, Compute, Inside and Compare of `nextscale demo` show, against independent computations."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.profile import make_profile, write_profile
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig, ExpertsConfig
from nextscale.demo import cheaper, comparing, editing, html
from nextscale.demo.cheaper import Amounts, compare_cost, explain_ways, list_ways
from nextscale.demo.growth import Request
from nextscale.demo.inside import look_inside
from nextscale.demo.models import Models
from nextscale.evaluation.flops import count_sampled_flops
from nextscale.research.analysis.dynamic import map_experts
from nextscale.transformer.feed_forward import collect
from tests.conftest import randomised, tiny_config
from tests.test_profiles import MEASURED

SETTINGS = SampleConfig(cfg=1.0, top_k=0, top_p=0.9, seed=4)
KINDS = {
    "dense": {},
    "mixture": {"experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    "zero": {"experts": ExpertsConfig(router="moe++", count=3, active=2)},
    "dynamic": {"dynamic": DynamicConfig(experts=8, scales=2)},
    "mamba": {"mixers": ("attention", "mamba")},
}


def mark_routers(pipeline):
    """The pipeline with its dynamic experts' routers marked as trained for its weights, where it has any."""
    model = pipeline.config.transformer
    if model.dynamic.experts:
        fingerprint = compute_router_fingerprint(pipeline.to_checkpoint().transformer, model)
        model = replace(model, dynamic=replace(model.dynamic, router_fingerprint=fingerprint))
        pipeline.config = replace(pipeline.config, transformer=model)
    return pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model of each kind; load(KIND) gives it."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, settings in KINDS.items():
        mark_routers(randomised(tiny_config(**settings))).save_pretrained(folder / kind)
    models = Models([str(folder / kind) for kind in KINDS])
    yield models
    models.close()


def find(models, kind):
    (source,) = (source for source in models.sources if Path(source).name == kind)
    return source


def picture(seed=0, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


# ---- inside


@torch.no_grad()
def step_through(model, tokens_1L, label):
    """Logits (N, V) and records of each scale, one step after the other with the true tokens."""
    pipeline, transformer = model.pipeline, model.pipeline.transformer
    conditioning = transformer.embed_condition(transformer.condition.parse([label]))
    cache, canvas = transformer.new_cache(1), pipeline.tokenizer.new_canvas(1)
    for k, (start, end) in enumerate(transformer.pyramid.spans):
        x = pipeline.tokenizer.next_input(canvas, k) if k else None
        output = transformer.step(conditioning, x, k, cache)
        yield output.logits_BNV[0].double().numpy(), output.records
        canvas = pipeline.tokenizer.add_scale(canvas, tokens_1L[:, start:end], k)


@pytest.mark.parametrize(
    ("kind", "label"), [("dense", 3), ("mixture", None), ("zero", 1), ("dynamic", 2), ("mamba", 0)]
)
def test_entropy_hits_and_experts_of_each_scale(models, kind, label):
    model, image = models.load(find(models, kind)), picture()
    view = look_inside(model, image, label)
    tokens_1L = model.pipeline.encode(image)
    spans = model.config.pyramid.spans
    nats = -model.pipeline.score(image, [label])[0].double().numpy()
    assert [scale.name for scale in view.scales] == ["1x1", "2x2", "3x3", "4x4"]
    for k, (logits_NV, records) in enumerate(step_through(model, tokens_1L, label)):
        scale, true_N = view.scales[k], tokens_1L[0, slice(*spans[k])].numpy()
        chance_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True))
        chance_NV /= chance_NV.sum(axis=1, keepdims=True)
        entropy_N = -(chance_NV * np.log(chance_NV)).sum(axis=1)
        assert np.allclose(np.ravel(scale.entropy), entropy_N, atol=1e-4)
        assert np.array_equal(np.ravel(scale.right), logits_NV.argmax(axis=1) == true_N)
        assert np.allclose(np.ravel(scale.tokens) * 32, true_N, atol=1e-4)
        assert scale.accuracy == pytest.approx(np.mean(logits_NV.argmax(axis=1) == true_N))
        assert scale.probability == pytest.approx(np.exp(-nats[k] / len(true_N)), rel=1e-4)
        for block, routing in enumerate(collect(records, "routing")):
            selected_NM = routing.selected_BNM[0].float().numpy()
            maps_NM = np.stack([np.ravel(values) for values in view.routing[block][k]], axis=1)
            assert np.array_equal(maps_NM, selected_NM)
            assert np.allclose(view.compute_load(block)[k], selected_NM.sum(axis=0) / selected_NM.sum())
    for block, scales in enumerate(view.routing):
        work_M = np.array([[np.sum(values) for values in experts] for experts in scales]).sum(axis=0)
        assert np.allclose(view.compute_load(block)[-1], work_M / work_M.sum())
    assert len(view.routing) == (2 if kind in ("mixture", "zero") else 0)
    assert len(view.experts) == {"mixture": 4, "zero": 7}.get(kind, 0)


def test_reconstructions_grow_to_that_of_the_pipeline(models):
    model, image = models.load(find(models, "dense")), picture(1, (30, 20))
    view = look_inside(model, image, None)
    whole = model.pipeline.reconstruct(image)
    assert view.scales[-1].picture == whole.pil()[0]
    assert view.picture == editing.fit_image(model, image)
    before, after = (np.asarray(view.scales[k].picture).astype(int) for k in (1, 2))
    assert np.abs(np.asarray(view.scales[2].added) - ((after - before) / 2 + 128)).max() <= 1
    error = ((whole.tensor.numpy()[0].transpose(1, 2, 0) - np.asarray(view.picture) / 255) ** 2).mean()
    assert view.scales[-1].psnr == pytest.approx(-10 * np.log10(error), abs=1e-3)


# ---- compute


def test_what_can_be_turned_down_is_said_in_words(models):
    dense, dynamic = (models.load(find(models, kind)) for kind in ("dense", "dynamic"))
    assert list_ways(dense) == [cheaper.PRUNE, cheaper.GUIDE, cheaper.INT8]
    assert list_ways(dynamic)[0] == cheaper.THRESHOLD
    assert cheaper.BUDGET not in list_ways(dynamic), "none was calibrated"
    assert "no dynamic experts (`nextscale sparsify` adds them). It can leave out tokens" in explain_ways(dense)
    assert "has dynamic experts" in explain_ways(dynamic)


def test_budgets_are_offered_where_thresholds_were_calibrated(models):
    rows = [{"share": 0.6, "tau": [0.2, 0.3]}, {"share": 0.9, "tau": [0.8, 0.7]}]
    model = replace(models.load(find(models, "dynamic")), origin={"dynamic": {"budgets": rows}})
    assert cheaper.find_budgets(model) == (0.6, 0.9)
    assert list_ways(model)[:2] == [cheaper.THRESHOLD, cheaper.BUDGET]


@pytest.mark.parametrize(
    ("kind", "way", "changes"),
    [
        ("dense", cheaper.PRUNE, {"prune": (0.5,), "prune_first_block": 1}),
        ("dense", cheaper.GUIDE, {"cfg_scales": 2}),
        ("dynamic", cheaper.THRESHOLD, {"tau": (0.3,)}),
        ("dynamic", cheaper.GUIDE, {"tau": (1.0,), "cfg_scales": 2}),
    ],
)
def test_full_and_reduced_are_those_of_the_pipeline_with_equal_seeds(models, kind, way, changes):
    model = models.load(find(models, kind))
    request, amounts = Request((1, 0), SETTINGS), Amounts(tau=0.3, guided=2)
    *steps, found = compare_cost(models, model.source, way, request, amounts)
    assert [len(step.full.scales) for step in steps] == [1, 2, 3] + [4] * 13, "twice four scales of both"
    full = replace(SETTINGS, tau=(1.0,)) if kind == "dynamic" else SETTINGS
    for growth, settings in ((found.full, full), (found.reduced, replace(SETTINGS, **changes))):
        assert list(growth.pictures) == model.pipeline.sample([1, 0], settings).pil()
        assert growth.flops == count_sampled_flops(model.pipeline, [1, 0], settings).flops
    assert found.reduced.flops < found.full.flops
    heads, *rows = found.list_rows()
    assert [row[0] for row in rows] == ["full", "reduced"]
    assert rows[1][heads.index("share of the FLOPs")] == f"{found.reduced.flops / found.full.flops:.0%}"
    if way == cheaper.THRESHOLD:
        maps = map_experts(model.pipeline, {"labels": [1]}, replace(SETTINGS, **changes))
        assert (found.maps.scales, found.maps.maps) == (maps.scales, maps.maps)
    else:
        assert found.maps is None


def test_all_experts_have_no_map(models):
    source, request = find(models, "dynamic"), Request((1,), SETTINGS)
    *_, found = compare_cost(models, source, cheaper.THRESHOLD, request, Amounts(tau=1.0))
    assert found.maps is None
    assert found.reduced.pictures == found.full.pictures


def test_a_profile_and_8_bits(models, tmp_path):
    randomised(tiny_config()).save_pretrained(tmp_path / "m")
    settings = SampleConfig(cfg=(0.0, 1.0, 0.0, 0.0), top_k=5)
    write_profile(tmp_path / "m", "fast", make_profile(tmp_path / "m", "bfloat16", settings, MEASURED))
    own = Models([str(tmp_path / "m")])
    model, request = own.load(own.sources[0]), Request((2,), SETTINGS)
    assert list_ways(model)[-1] == "Profile fast"
    chosen, asked = cheaper.choose_cheaper(own, model.source, "Profile fast", request, Amounts())
    assert (chosen.dtype, asked.settings) == ("bfloat16", replace(settings, seed=4))
    chosen, asked = cheaper.choose_cheaper(own, model.source, cheaper.INT8, request, Amounts())
    assert (chosen.dtype, asked) == ("int8", request)
    with pytest.raises(UserError, match="choose what to turn down"):
        cheaper.choose_cheaper(own, model.source, "", request, Amounts())
    own.close()


def test_a_way_that_does_not_fit_the_model_says_why(models):
    with pytest.raises(UserError, match="prune cannot work with mamba"):
        list(compare_cost(models, find(models, "mamba"), cheaper.PRUNE, Request((1,), SETTINGS), Amounts()))


# ---- compare


def test_two_sides_are_those_of_their_pipelines_and_classes_are_matched_by_name(tmp_path):
    for name, names in (("a", "vwxyz"), ("b", "zyxwv"), ("c", "vwxyq")):
        config = replace(tiny_config(), class_names=tuple(names))
        randomised(config, seed=ord(name)).save_pretrained(tmp_path / name)
    models = Models([str(tmp_path / name) for name in "abc"])
    a, b, c = models.sources
    sides = comparing.Side(a, "", SETTINGS), comparing.Side(b, "", replace(SETTINGS, cfg=2.0))
    *_, grown = comparing.compare_sides(models, a, *sides, (0, 1, None))
    for growth, labels, side in zip(grown, ([0, 1, None], [4, 3, None]), sides, strict=True):
        assert growth.captions == ["v", "w", "no label"]
        assert list(growth.pictures) == models.load(side.source).pipeline.sample(labels, side.settings).pil()
    table = comparing.draw_sides(grown)
    assert table.count("<tr>") == 3
    with pytest.raises(UserError, match="there is no class named 'z'"):
        comparing.match_asked(models.load(a), models.load(c), (4,))
    models.close()


# ---- edit


@pytest.mark.parametrize("area", [area for area in editing.AREAS if area != editing.DRAWN])
def test_a_fixed_part_is_repainted_as_by_the_pipeline(models, area):
    model, image = models.load(find(models, "dense")), picture(2)
    mask = editing.build_mask((8, 8), area)
    y, x = np.mgrid[0:8, 0:8]
    parts = {"Left half": x < 4, "Right half": x >= 4, "Upper half": y < 4, "Lower half": y >= 4,
             "Centre": (x // 2 % 3 != 0) & (y // 2 % 3 != 0), "Everything": x >= 0}  # fmt: skip
    assert np.array_equal(np.asarray(mask) == 0, parts[area])
    edited = editing.repaint(model, image, mask, 2, SETTINGS)
    assert edited.repainted == parts[area].mean()
    kept = 1.0 - parts[area].astype(np.float32)
    assert edited.after == model.pipeline.edit(image, kept, 2, SETTINGS).pil()[0]
    assert edited.before == image


def test_a_drawing_of_any_size_is_a_mask_and_an_empty_one_is_refused():
    drawing = Image.new("RGBA", (80, 80))
    drawing.paste((230, 0, 126, 255), (0, 0, 40, 20))
    mask = np.asarray(editing.build_mask((8, 8), editing.DRAWN, drawing))
    assert np.argwhere(mask == 0).tolist() == [[row, column] for row in range(2) for column in range(4)]
    for empty in (None, Image.new("RGBA", (80, 80))):
        with pytest.raises(UserError, match="draw on the picture what to repaint"):
            editing.build_mask((8, 8), editing.DRAWN, empty)


def test_the_command_gives_the_edit_of_the_page(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, image = models.load(find(models, "mixture")), picture(3)
    mask = editing.build_mask((8, 8), "Left half")
    image.save("photo.png")
    mask.save("mask.png")
    command = f"edit {model.source} photo.png --mask mask.png --label 1 --seed 9 --device cpu --dtype {model.dtype}"
    assert main([*command.split(), "--out", "edited.png"]) == 0
    edited = editing.repaint(model, image, mask, 1, SampleConfig(seed=9))
    assert Image.open("edited.png").tobytes() == edited.after.tobytes()


def test_uploads_of_any_kind_fit_the_model_or_are_refused(models, tmp_path):
    model = models.load(find(models, "dense"))
    wide = Image.fromarray(np.arange(40 * 20, dtype=np.uint8).reshape(20, 40))
    wide.save(tmp_path / "grey.png")
    assert editing.fit_image(model, str(tmp_path / "grey.png")).size == (8, 8)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot read image"):
        editing.fit_image(model, str(tmp_path / "text.png"))
    assert editing.enlarge(wide).size == (360, 180)
    assert editing.enlarge(Image.new("RGB", (500, 400))).size == (500, 400)


# ---- tables


def test_colours_are_those_of_the_analyses():
    matplotlib = pytest.importorskip("matplotlib")
    values = np.linspace(0, 1, 101)
    expected = matplotlib.colormaps["viridis"](values)[:, :3] * 255
    found = np.asarray(html.colour_map([(3 * values).tolist()], highest=3.0))[0]
    assert np.abs(found - expected).max() < 20
    assert np.abs(found - expected).mean() < 2


def test_tables_name_their_pictures_and_hold_no_foreign_html():
    cell = html.Cell(picture(), 'a "<b>', "5 %")
    table = html.draw_table(["<i>", "b"], [("<u>", [cell])], "<title>")
    assert not any(mark in table for mark in ("<i>", "<u>", "<b>", "<title>"))
    assert 'alt="a &quot;&lt;b&gt;"' in table
    assert "5 %</td>" in table
