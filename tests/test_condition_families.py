"""Each kind of condition with each family of models and use of them works, or is refused with a reason.

The table of docs/conditions.md is what this finds: `python -m tests.test_condition_families` writes it there.
"""

from __future__ import annotations

import re
import tempfile
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from nextscale.checkpoints.adapt import NewClass, adapt
from nextscale.checkpoints.official import export_official
from nextscale.common.errors import UserError
from nextscale.conditions import read_condition
from nextscale.config.analysis import AnalysisConfig
from nextscale.config.condition import ConditionConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import DynamicConfig, ExpertsConfig, MambaConfig
from nextscale.data.examples import MemoryExamples
from nextscale.evaluation.images import open_images
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.analyzed_model import AnalyzedModel
from nextscale.training.transformer import TransformerTask
from tests.conftest import randomised, tiny_config

PAGE = Path(__file__).parents[1] / "docs" / "conditions.md"
TITLE = "## What works with what"
TEXT = ConditionConfig("text", max_tokens=6, layers=1)
EDGES = ConditionConfig("picture", control="edges", picture_size=(6, 6), patch=3, layers=0)
KINDS = {
    "class": ConditionConfig(num_classes=5),
    "text": TEXT,
    "vector": ConditionConfig("vector", embedding_width=4),
    "picture": EDGES,
    "combined": ConditionConfig("combined", parts={"edges": EDGES, "caption": TEXT}),
}
CONTROL = (torch.arange(72).view(2, 1, 6, 6) % 5 < 2).float()
GIVEN = {
    "class": {"labels": [1, 4]},
    "text": {"prompts": ["a cat", "dog"]},
    "vector": {"vectors": [[1.0, 2, 3, 5], [4.0, 2, 0, 1]]},
    "picture": {"control": CONTROL},
    "combined": {"control": CONTROL, "prompts": ["a cat", "dog"]},
}
BATCH = {
    "image": torch.arange(2 * 3 * 36).view(2, 3, 6, 6).mul(7).remainder(256).to(torch.uint8),
    "label": torch.tensor([1, 4]),
    "text": torch.tensor([list(b"a cat"), list(b"dog  ")]),
    "text_length": torch.tensor([5, 3]),
    "vector": torch.tensor(GIVEN["vector"]["vectors"]),
}
MVAR = {"mixers": ("scale-attention", "mamba"), "mamba": MambaConfig(state_width=8, head_width=16)}
DYNAMIC = DynamicConfig(experts=8, scales=2, router_width=8, router_fingerprint="trained")
MODELS = {
    "dense": {},
    **{f"router {router}": {"experts": ExpertsConfig(router, count=3, active=2)} for router in ("stmoe", "smoe")},
    **{f"router {name}": {"experts": ExpertsConfig(name, count=3, active=2)} for name in ("expert-choice", "moe++")},
    "M-VAR": MVAR,
    "dynamic experts": {"dynamic": DYNAMIC},
}


@lru_cache(maxsize=64)
def create(kind: str, model: str = "dense", depth: int = 2) -> Pipeline:
    settings = {"mixers": ("attention",), **MODELS[model]}
    if KINDS[kind].gives_sequence:
        settings["mixers"] = (*settings["mixers"], "cross-attention")
    return randomised(tiny_config("1,2,3", depth=depth, condition=KINDS[kind], **settings))


def select(kind: str, index: int) -> dict:
    return {name: values[index : index + 1] for name, values in GIVEN[kind].items()}


def sample(kind: str, pipeline: Pipeline, **settings) -> None:
    """Two images, each as it is alone."""
    together = pipeline.sample(**GIVEN[kind], **settings).tokens
    for i in range(2):
        assert torch.equal(pipeline.sample(**select(kind, i), first_image=i, **settings).tokens[0], together[i])


def sample_model(model: str, kind: str) -> None:
    sample(kind, create(kind, model), **({"tau": (0.4,)} if model == "dynamic experts" else {}))


def prune(kind: str) -> None:
    sample(kind, create(kind), prune=(0.5,), prune_first_block=1)


def refine(kind: str) -> None:
    pipeline = create(kind, depth=2)
    sample(kind, pipeline.refine_with(create(kind, depth=1)), draft_scales=2)


def run_captured(kind: str) -> None:
    pipeline = create(kind)
    plain = pipeline.sample(**GIVEN[kind]).tokens
    try:
        assert torch.equal(pipeline.capture("on").sample(**GIVEN[kind]).tokens, plain)
        assert torch.equal(pipeline.sample(**GIVEN[kind]).tokens, plain)
    finally:
        pipeline.capture("auto")


def guide_parts(kind: str) -> None:
    sample(kind, create(kind), cfg_parts={"edges": 1.0, "caption": 3.0})


def use_negative_prompts(kind: str) -> None:
    sample(kind, create(kind), negative_prompts="cat")


def edit(kind: str) -> None:
    values = {name: entry[:1] for name, entry in GIVEN[kind].items() if name != "labels"}
    label = {"label": 1} if kind == "class" else {}
    mask = torch.zeros(6, 6)
    mask[:, :3] = 1
    create(kind).edit(BATCH["image"][0], mask, **label, **values)


def score(kind: str) -> None:
    assert create(kind).score(BATCH["image"], **GIVEN[kind]).shape == (2, 3)


def quantise(kind: str) -> None:
    sample(kind, Pipeline.from_checkpoint(create(kind).to_checkpoint()).to("cpu", torch.int8).optimize())


def use_bfloat16(kind: str) -> None:
    sample(kind, Pipeline.from_checkpoint(create(kind).to_checkpoint(), dtype="bfloat16").optimize())


def train(kind: str) -> None:
    """Gradients of a batch of the data reach every parameter of the condition."""
    pipeline = Pipeline.from_config(create(kind).config)
    examples = MemoryExamples(**BATCH)
    task = TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, TrainConfig(label_drop=0.5))
    noise = task.draw_noise(2, torch.Generator().manual_seed(3))
    task(examples.fetch([0, 1], None), noise, 0)[0].backward()
    condition = pipeline.transformer.condition
    assert all(parameter.grad is not None for parameter in condition.parameters())
    assert sum(float(parameter.grad.abs().sum()) for parameter in condition.parameters()) > 0


def measure(kind: str) -> None:
    """By classes, or by what the images of the reference set give."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        create(kind).save_pretrained(folder / "MODEL")
        (folder / "data").mkdir()
        for i, text in enumerate(("a cat", "dog")):
            Image.new("RGB", (6, 6)).save(folder / "data" / f"{i}.png")
            (folder / "data" / f"{i}.txt").write_text(text)
        images = open_images(str(folder / "MODEL"), 3, 0, SampleConfig(), 3, given_by=str(folder / "data"))
        assert len(images.fetch(0, 3)) == 3


def analyse(kind: str) -> None:
    """The forward pass of `analyse load`, `routing` and `features` on held-out images."""
    rows = range(2)
    analyzed = AnalyzedModel("model", create(kind), MemoryExamples(**BATCH), rows, AnalysisConfig())
    (output,) = analyzed.run_batches()
    assert output.logits_BNV.shape[0] == 2


def adapt_classes(kind: str) -> None:
    adapt(create(kind).to_checkpoint(), [NewClass("cat", 1)], None)


def export(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export_official(create(kind).to_checkpoint(), None, Path(folder) / "FILE")


USES = {
    **{name: partial(sample_model, name) for name in MODELS},
    "token pruning": prune,
    "a refiner (CoDe)": refine,
    "captured steps": run_captured,
    "guidance for each part": guide_parts,
    "negative prompts": use_negative_prompts,
    "editing": edit,
    "likelihood": score,
    "linear layers in 8 bits": quantise,
    "bfloat16": use_bfloat16,
    "training": train,
    "measuring (`evaluate`)": measure,
    "analysing (`analyse load`, `features`)": analyse,
    "other classes (`adapt`)": adapt_classes,
    "official files": export,
}


@lru_cache(maxsize=128)
def find_reason(use: str, kind: str) -> str:
    """Why it is refused; empty where it works."""
    try:
        USES[use](kind)
    except UserError as error:
        reason = str(error).replace(KINDS[kind].describe(), "...")
        return re.sub(r"/\S+/(FILE|MODEL)", r"\1", reason)
    return ""


def write_table() -> str:
    """The section of the page: the table, and the reasons by number."""
    reasons: list[str] = []
    lines = [f"| | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for use in USES:
        cells = []
        for kind in KINDS:
            reason = find_reason(use, kind)
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(f"refused ({reasons.index(reason) + 1})" if reason else "yes")
        lines.append(f"| {use} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def test_the_page_has_the_table_that_is_found():
    section = PAGE.read_text().partition(TITLE)[2].partition("\n## ")[0]
    table = write_table()
    assert table in section, f"run python -m tests.test_condition_families; found\n{table}"


@pytest.mark.parametrize("use", USES)
def test_classes_work_with_all_that_are_not_for_parts_and_texts(use):
    expected = use in ("guidance for each part", "negative prompts")
    assert bool(find_reason(use, "class")) == expected


def test_values_of_callers_are_those_of_batches():
    for kind in KINDS:
        pipeline = create(kind)
        given = {name: values for name, values in GIVEN[kind].items() if name not in ("labels", "control")}
        if kind in ("text", "vector"):
            values = read_condition(pipeline, None, given, None)[0]
            stored = pipeline.transformer.condition.from_batch(BATCH)
            both = [pipeline.transformer.condition(v).vector_BD for v in (values, stored)]
            assert torch.equal(*both)


if __name__ == "__main__":
    text = PAGE.read_text()
    found = re.compile(r"(?<=\n)\| \| class .*?(?=\n\n## )", re.DOTALL)
    PAGE.write_text(found.sub(lambda _: write_table(), text))
