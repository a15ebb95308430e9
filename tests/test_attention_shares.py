"""How attention is shared out among scales: against a softmax in float64, pictures, refusals, columns of a table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.analysis import AnalysisConfig
from nextscale.config.transformer import ExpertsConfig, PositionConfig
from nextscale.data.examples import MemoryExamples
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.analyzed_model import AnalyzedModel
from nextscale.research.analysis.attention import measure_attention
from nextscale.transformer.positions import compute_rotation, rotate
from tests.conftest import randomised, tiny_config
from tests.test_cli import fails
from tests.test_condition_families import BATCH, KINDS, MVAR, create

SCALE_OF = [0, 1, 1, 1, 1, *[2] * 9]
STMOE = {"experts": ExpertsConfig("stmoe", count=3, active=2)}


def build(**settings) -> Pipeline:
    return randomised(tiny_config("1,2,3", **settings))


def measure(pipeline: Pipeline, images: int = 2) -> dict:
    examples = MemoryExamples(**BATCH)
    return measure_attention(AnalyzedModel("model", pipeline, examples, range(images), AnalysisConfig(batch_size=1)))


def run_by_loop(pipeline: Pipeline, heads: int = 4) -> np.ndarray:
    """The shares (blocks, 3, 3) by a softmax for every image, head and query, from the weights and inputs of the
    layers, in float64."""
    model, tokens, seen = pipeline.transformer, pipeline.encode(BATCH["image"].numpy().transpose(0, 2, 3, 1)), []
    layers = [block.mixers[0] for block in model.blocks]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: seen.append((layer, given))) for layer in layers]
    with torch.no_grad():
        model(model.condition.from_batch(BATCH), pipeline.tokenizer.teacher_inputs(tokens))
    for hook in hooks:
        hook.remove()
    found = np.zeros((len(layers), 3, 3))
    for s, (layer, (x, context, _)) in enumerate(seen):
        x = x.double().numpy()
        width = x.shape[-1]
        parameters = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
        weight, bias = parameters["qkv.weight"], parameters["q_bias"]
        q, k = x @ weight[:width].T + bias, x @ weight[width : 2 * width].T
        q, k = (a.reshape(len(x), 14, heads, width // heads) for a in (q, k))
        scale = 0.25 / np.sqrt(width // heads)
        if layer.log_scale is not None:
            q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
            q, scale = q * np.exp(parameters["log_scale"].reshape(1, 1, heads, 1)), 1.0
        if layer.rotary is not None:  # tests/test_positions.py compares it with its formula
            rotation = compute_rotation(context.pyramid, layer.rotary, width // heads, torch.device("cpu"))
            q, k = (rotate(torch.from_numpy(a).transpose(1, 2), rotation).transpose(1, 2).numpy() for a in (q, k))
        for image in range(len(x)):
            for head in range(heads):
                for i in range(14):
                    visible = [j for j in range(14) if SCALE_OF[j] <= SCALE_OF[i]]
                    scores = np.array([scale * q[image, i, head] @ k[image, j, head] for j in visible])
                    weights = np.exp(scores - scores.max())
                    for j, share in zip(visible, weights / weights.sum(), strict=True):
                        count = len(x) * heads * SCALE_OF.count(SCALE_OF[i])
                        found[s, SCALE_OF[i], SCALE_OF[j]] += share / count
    return found


CASES = {
    "dense": {},
    "no q/k normalisation": {"qk_norm": False},
    "mixture": STMOE,
    "rotary": {"positions": PositionConfig("rotary")},
}


@pytest.mark.parametrize("case", CASES)
def test_shares_equal_a_softmax_in_float64(case):
    pipeline = build(**CASES[case])
    report, expected = measure(pipeline), run_by_loop(pipeline)
    np.testing.assert_allclose(report["attention"], expected, atol=1e-6)
    assert report["blocks"] == [1, 2]
    own = expected[:, [1, 2], [1, 2]]  # of the scales that see an earlier one
    assert report["own_share"] == pytest.approx((own @ [4, 9]).mean() / 13, abs=1e-6)
    assert report["own_share_per_block"] == pytest.approx(own @ [4, 9] / 13, abs=1e-6)
    assert report["own_share_per_scale"] == pytest.approx([1, *own.mean(0)], abs=1e-6)
    assert report["uniform_share_per_scale"] == pytest.approx([1, 4 / 5, 9 / 14])
    assert report["uniform_share"] == pytest.approx((4 * 4 / 5 + 9 * 9 / 14) / 13)
    assert report["products_share"] == pytest.approx((16 + 81) / (4 * 5 + 9 * 14))
    assert abs(own - [4 / 5, 9 / 14]).max() > 0.02, "uniform attention would hide mistakes"


@pytest.mark.parametrize("kind", KINDS)
def test_every_condition_and_type(kind):
    """Attention to a caption is another layer and takes no share; rounded models differ by their rounding."""
    pipeline = create(kind)
    report, expected = measure(pipeline), run_by_loop(pipeline)
    np.testing.assert_allclose(report["attention"], expected, atol=1e-6)
    checkpoint = pipeline.to_checkpoint()
    for rounded in (
        Pipeline.from_checkpoint(checkpoint, dtype="bfloat16").optimize(),
        Pipeline.from_checkpoint(checkpoint).to("cpu", torch.int8).optimize(),
    ):
        found = np.array(measure(rounded)["attention"])
        np.testing.assert_allclose(found.sum(-1), 1)
        np.testing.assert_allclose(found, expected, atol=0.05)
    assert len(create(kind).transformer.blocks[0].mixers[0]._forward_pre_hooks) == 0, "the model is as it was"


def test_attention_within_a_scale_has_no_other_share():
    with pytest.raises(UserError, match="has the mixers scale-attention mamba: no attention sees earlier scales"):
        measure(build(**MVAR))
    some = build(**MVAR, depth=3, global_blocks=2)
    report = measure(some)
    assert report["blocks"] == [2, 3], "the last blocks have attention to all scales"
    assert np.shape(report["attention"]) == (2, 3, 3)
    with pytest.raises(UserError, match="model has one scale"):
        measure(randomised(tiny_config("3")))


def test_the_command_writes_a_picture_and_numbers(tmp_path, capsys):
    for name, settings in (("dense", {}), ("mixture", STMOE), ("m-var", MVAR)):
        build(**settings).save_pretrained(tmp_path / name)
    pictures = tmp_path / "pictures"
    for i in range(10):
        (pictures / str(i % 5)).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / str(i % 5) / f"{i}.png")
    command = ["analyse", "attention", "--data", pictures, "--images.held-out", "0.5", "--out", tmp_path / "out"]
    command = [*map(str, command)]
    assert main([*command, str(tmp_path / "dense"), str(tmp_path / "mixture")]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    for model in report["models"]:
        assert f"{model['name']}: {model['own_share']:.1%} of the attention is to the token's own scale" in said
    assert [model["images"] for model in report["models"]] == [5, 5]
    assert Image.open(tmp_path / "out" / "attention.png").size > (900, 700)
    assert "no attention sees earlier scales" in fails(capsys, *command, "--overwrite", tmp_path / "m-var")
