"""A trained model with a further condition computes what it did, until it is trained; then it follows the condition."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nextscale.checkpoints.add_conditions import add_conditions
from nextscale.checkpoints.native import read_checkpoint
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.data.examples import MemoryExamples
from nextscale.pipeline import Pipeline
from nextscale.training.engine.loop import train
from nextscale.training.transformer import TransformerTask
from tests.conftest import randomised, tiny_config
from tests.test_condition_families import CONTROL, EDGES, KINDS, MODELS, TEXT, create

FAMILIES = {
    **MODELS,
    "shared adaLN": {"shared_adaln": True},
    "M-VAR, global blocks": {**MODELS["M-VAR"], "global_blocks": 1},
}
BOTH = {"control": EDGES, "text": TEXT}
GUIDED = SampleConfig(cfg=1.5, top_k=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_draws_what_it_drew_before_whatever_the_new_condition_says(family):
    model = randomised(tiny_config("1,2,3", depth=2, condition=KINDS["class"], **FAMILIES[family]))
    before = model.to_checkpoint()
    after = add_conditions(before, BOTH, seed=1)
    adapted = Pipeline.from_checkpoint(after)
    expected = model.sample([1, 4], GUIDED).tensor
    assert torch.equal(adapted.sample([1, 4], GUIDED).tensor, expected)
    assert torch.equal(adapted.sample([1, 4], GUIDED, control=CONTROL, prompts=["a cat", "dog"]).tensor, expected)
    stored = {tensor.data_ptr() for tensor in after.transformer.values()}
    same = [name for name, tensor in before.transformer.items() if tensor.data_ptr() in stored]
    assert [name for name in before.transformer if name not in same and "adaln" not in name] == []


@pytest.mark.parametrize("kind", ["vector", "class"])
def test_in_bfloat16_with_a_seed_of_its_own_and_for_vectors(kind):
    before = create(kind).to_checkpoint()
    half = replace(before, transformer={name: value.bfloat16() for name, value in before.transformer.items()})
    one, other = (add_conditions(half, BOTH, seed=seed).transformer for seed in (1, 2))
    assert {value.dtype for value in one.values()} == {torch.bfloat16}
    name = "condition.parts.control.project.weight"
    assert not torch.equal(one[name], other[name])
    assert torch.equal(one["head.weight"], half.transformer["head.weight"])


def test_trained_it_follows_the_new_condition(tmp_path):
    """Two images of one class that differ in their control picture: without it the first token is a guess among two,
    and the thirteen others follow from it."""
    data = {
        "tokens": torch.randint(0, 32, (2, 14), generator=torch.Generator().manual_seed(0)),
        "label": torch.tensor([1, 1]),
        "edges": (255 * CONTROL).to(torch.uint8),
    }
    config = TrainConfig(steps=30, batch_size=2, learning_rate=1e-2, warmup_steps=5, label_drop=0.0, log_every=1)
    losses = {}
    for name, parts in {"class": {}, "edges": {"control": EDGES}}.items():
        before = create("class").to_checkpoint()
        model = Pipeline.from_checkpoint(add_conditions(before, parts) if parts else before, backend="plain")
        task = TransformerTask(model.transformer, model.tokenizer, MemoryExamples(**data), config)
        train(task, config, tmp_path / name)
        losses[name] = read_log(tmp_path / name / "log.jsonl")[-1]["loss"]
    assert losses["class"] > 0.98 * np.log(2) / 14
    assert losses["edges"] < 0.2 * losses["class"]


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("text", {"control": EDGES}, "train a model with a combined condition from the start"),
        ("combined", {"control": EDGES}, "further tokens there would change"),
        ("class", {"class": EDGES}, "has a part 'class' already: 5 classes"),
    ],
)
def test_what_cannot_be_added_says_why(kind, parts, message):
    with pytest.raises(UserError, match=message):
        add_conditions(create(kind).to_checkpoint(), parts)


def test_a_quantised_model_is_refused():
    before = create("class").to_checkpoint()
    quantised = {**before.transformer, "blocks.0.ffn.fc1.weight": torch.zeros(4, 4, dtype=torch.int8)}
    with pytest.raises(UserError, match="adapt the model that it was made from"):
        add_conditions(replace(before, transformer=quantised), {"control": EDGES})


def test_the_command_writes_a_model_that_is_sampled_with_a_control_picture(tiny_folder, tmp_path):
    assert main(["adapt", str(tiny_folder), "--control", "edges", "--text", "--out", str(tmp_path / "new")]) == 0
    config = read_checkpoint(tmp_path / "new").config
    assert config.transformer.condition.describe() == (
        "5 classes and captions of up to 64 tokens and control pictures of 8 x 8 pixels"
    )
    assert config.transformer.mixers == ("attention", "cross-attention")
    old, new = (Pipeline.from_pretrained(folder, dtype="float32") for folder in (tiny_folder, tmp_path / "new"))
    edges = torch.ones(1, 1, 8, 8)
    assert torch.equal(new.sample([3], control=edges, prompts=["a cat"]).tensor, old.sample([3]).tensor)
