"""What the page of `nextscale demo` shows of models that read texts equals what the pipeline and the commands give."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig
from nextscale.demo import cheaper, comparing, editing
from nextscale.demo.growth import Request, grow
from nextscale.demo.inside import look_inside
from nextscale.demo.models import Models
from nextscale.demo.recipe import write_command, write_python
from nextscale.research.analysis.dynamic import map_experts
from tests.conftest import randomised, tiny_config
from tests.test_demo_views import mark_routers

TEXT = ConditionConfig("text", max_tokens=8, layers=1)
EDGES = ConditionConfig("picture", control="edges", picture_size=(8, 8), layers=0)
CROSS = {"mixers": ("attention", "cross-attention")}
CONFIGS = {
    "text": tiny_config(condition=TEXT, **CROSS),
    "both": tiny_config(condition=ConditionConfig("combined", parts={"edges": EDGES, "words": TEXT}), **CROSS),
    "dynamic": tiny_config(condition=TEXT, dynamic=DynamicConfig(experts=8, scales=2, router_width=8), **CROSS),
    "class": tiny_config(),
    "vector": tiny_config(condition=ConditionConfig("vector", embedding_width=4)),
}
ASKED = ('a cat\'s "hat"', None, "två hundar")
SETTINGS = SampleConfig(cfg=2.0, top_k=20, seed=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, config in CONFIGS.items():
        mark_routers(randomised(config)).save_pretrained(folder / name)
    models = Models([str(folder / name) for name in CONFIGS])
    yield models
    models.close()


def load(models, name):
    return models.load(next(source for source in models.sources if source.endswith(name)))


@pytest.mark.parametrize("name", ["text", "both"])
def test_command_line_and_python_give_the_bytes_of_the_page(models, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, request = load(models, name), Request(ASKED, SETTINGS)
    *_, growth = models.iterate(grow(model, request))
    assert growth.captions == [ASKED[0], "", ASKED[2]]
    assert list(growth.pictures) == model.pipeline.sample(prompts=list(ASKED), config=SETTINGS).pil()
    page = growth.write(tmp_path / "page.png")
    exec(write_python(model, request), {})
    assert (tmp_path / "grid.png").read_bytes() == page.read_bytes()
    (tmp_path / "grid.png").unlink()
    assert main(shlex.split(write_command(model, request))[1:]) == 0
    assert Image.open("grid.png").tobytes() == Image.open(page).tobytes()


def test_a_picture_is_seen_and_repainted_with_its_text(models):
    model, rng = load(models, "text"), np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    nats_1K = model.pipeline.score(picture, prompts="a cat")
    view = look_inside(model, picture, "a cat")
    expected = (nats_1K[0] / torch.tensor([1, 4, 9, 16])).exp()
    assert [scale.probability for scale in view.scales] == pytest.approx(expected.tolist(), rel=1e-4)
    mask = editing.build_mask((8, 8), "Left half")
    edited = editing.repaint(model, picture, mask, "a cat", SETTINGS)
    assert edited.after == model.pipeline.edit(picture, mask, config=SETTINGS, prompts="a cat").pil()[0]
    assert edited.after != editing.repaint(model, picture, mask, None, SETTINGS).after


def test_experts_are_mapped_and_two_models_are_compared_with_equal_texts(models):
    dynamic, request = load(models, "dynamic"), Request(ASKED[:1], SETTINGS)
    amounts = cheaper.Amounts(tau=0.3)
    *_, found = cheaper.compare_cost(models, dynamic.source, cheaper.THRESHOLD, request, amounts)
    expected = map_experts(dynamic.pipeline, {"prompts": [ASKED[0]]}, replace(SETTINGS, tau=(0.3,)))
    assert found.maps == expected
    text, both, of_classes = (load(models, name) for name in ("text", "both", "class"))
    sides = [comparing.Side(model.source, "", SETTINGS) for model in (text, both, of_classes)]
    *_, grown = comparing.compare_sides(models, text.source, *sides[:2], ASKED)
    for growth, model in zip(grown, (text, both), strict=True):
        assert list(growth.pictures) == model.pipeline.sample(prompts=list(ASKED), config=SETTINGS).pil()
    with pytest.raises(UserError, match="text reads texts and .*class takes classes: compare two of one kind"):
        list(comparing.compare_sides(models, text.source, sides[0], sides[2], ASKED))


def test_a_model_of_vectors_is_refused(models):
    with pytest.raises(UserError, match="draws images from vectors of width 4, and the page asks for classes or for o"):
        load(models, "vector")
