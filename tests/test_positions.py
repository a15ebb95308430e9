"""One model at several sizes: it computes there what `nextscale adapt` would make of it, by tables or by rotation."""

import cmath
import math

import numpy as np
import pytest
import torch
from torch import nn

from nextscale.checkpoints.official import export_official
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import DynamicConfig, ExpertsConfig, MambaConfig, PositionConfig, TransformerConfig
from nextscale.derived import choose_pyramid
from nextscale.evaluation.images import open_images
from nextscale.info import sample_flops
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.sampling.combinations import Request, find_refusal
from nextscale.transformer.attention import Attention
from nextscale.transformer.context import ScaleContext
from nextscale.transformer.positions import SizeEmbedding, compute_rotation, rotate
from tests.conftest import randomised, tiny_config

ROTARY, SIZED = PositionConfig("rotary"), PositionConfig(size_embedding=True)
CASES = {
    "table": {},
    "table and size": {"positions": SIZED},
    "mixture": {"positions": ROTARY, "experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    "mvar": {
        "positions": PositionConfig("rotary", size_embedding=True),
        "mixers": ("scale-attention", "mamba"),
        "mamba": MambaConfig(head_width=16),
        "global_blocks": 1,
    },
}


@pytest.fixture(scope="module", params=CASES)
def pipeline(request):
    return randomised(tiny_config("1,2,3,4", **CASES[request.param]))


@pytest.mark.parametrize("scales", ["1,2,3", "2,1x3,4x6"])
def test_a_model_at_another_size_equals_the_adapted_one(pipeline, scales):
    view = pipeline.at(scales)
    own = Pipeline.from_checkpoint(view.to_checkpoint())
    ours, theirs = (p.sample([1, None], seed=3, cfg=1.0) for p in (view, own))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.tensor, theirs.tensor)
    assert own.config.pyramid == Pyramid.parse(scales)
    assert own.transformer.other_tables is None
    back = view.at("1,2,3,4").sample([1], seed=3)
    assert torch.equal(back.tensor, pipeline.sample([1], seed=3).tensor)


def test_an_image_does_not_depend_on_its_batch_at_another_size(pipeline):
    view = Pipeline.from_checkpoint(pipeline.to_checkpoint(), backend="plain").optimize().at("1,2x3,4x6")
    both = view.sample([1, None], seed=3, cfg=1.0).tensor
    assert torch.equal(view.sample([None], seed=3, cfg=1.0, first_image=1).tensor[0], both[1])


def test_steps_with_a_cache_equal_one_pass_over_all_scales_or_the_first_ones(pipeline):
    view = pipeline.at("2,1x3,4x6")
    model, pyramid = view.transformer, view.config.pyramid
    inputs = view.tokenizer.teacher_inputs(torch.randint(0, 32, (2, pyramid.length)))
    labels, first = torch.tensor([1, 5]), pyramid.counts[0]
    with torch.no_grad():
        whole = model(labels, inputs).logits_BNV
        given, cache = model.embed_condition(labels), model.new_cache(2)
        for k, (start, end) in enumerate(pyramid.spans):
            x_BNC = inputs[:, start - first : end - first] if k else None
            logits = model.step(given, x_BNC, k, cache).logits_BNV
            torch.testing.assert_close(logits, whole[:, start:end], atol=1e-4, rtol=1e-4)
        part = model(labels, inputs[:, : pyramid.spans[1][1] - first], scales=2).logits_BNV
    torch.testing.assert_close(part, whole[:, : pyramid.spans[1][1]], atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_tables_and_training_twins_agree(pipeline):
    model = Pipeline.from_checkpoint(pipeline.to_checkpoint(), backend="plain").transformer.at(Pyramid.parse("1,2x3"))
    logits = model(torch.tensor([1]), torch.zeros(1, 6, 4)).logits_BNV
    logits.square().sum().backward()
    tables = [model.level_embed.weight, *([] if model.pos_embed is None else [model.pos_embed])]
    assert all(table.grad.abs().sum() > 0 for table in tables)
    fast = pipeline.transformer.at(Pyramid.parse("1,2x3"))
    torch.testing.assert_close(fast(torch.tensor([1]), torch.zeros(1, 6, 4)).logits_BNV, logits, atol=1e-4, rtol=1e-4)


def test_captured_steps_at_another_size():
    pipeline = randomised(tiny_config("1,2,3,4", **CASES["mixture"])).at("1,2x3,3x5")
    plain = pipeline.sample([1, 2], seed=1)
    assert torch.equal(pipeline.capture("on").sample([1, 2], seed=1).tensor, plain.tensor)


def test_int8_and_bfloat16_at_another_size():
    checkpoint = randomised(tiny_config("1,2,3,4", positions=ROTARY)).to_checkpoint()
    for dtype in ("int8", "bfloat16"):
        pipeline = Pipeline.from_checkpoint(checkpoint, dtype=dtype) if dtype != "int8" else None
        if pipeline is None:
            pipeline = Pipeline.from_checkpoint(checkpoint).to("cpu", torch.int8)
        assert pipeline.at("1,2x3,3x5").sample([1]).tensor.shape == (1, 3, 6, 10)


def find_angle(place, frequency):
    return cmath.exp(1j * place * frequency)


def test_rotation_against_complex_numbers():
    """Value i and value i + f of a head are one complex number, which is turned by its coordinate."""
    pyramid, config, d = Pyramid.parse("1,2,2x3,4x6"), PositionConfig("rotary", base=50.0, extent=9.0), 8
    x = torch.randn(2, 3, pyramid.length, d, generator=torch.Generator().manual_seed(0))
    ours = rotate(x, compute_rotation(pyramid, config, d, torch.device("cpu"))).numpy()
    height, width = 9 * math.sqrt(4 / 6), 9 * math.sqrt(6 / 4)
    position = 0
    for h, w in pyramid.sides:
        for row in range(h):
            for column in range(w):
                y, z = (row + 0.5) / h * height, (column + 0.5) / w * width
                turns = np.array([find_angle(y, 1), find_angle(y, 50**-0.5), find_angle(z, 1), find_angle(z, 50**-0.5)])
                values = x[:, :, position].numpy()
                expected = (values[..., :4] + 1j * values[..., 4:]) * turns
                np.testing.assert_allclose(ours[:, :, position, :4], expected.real, atol=1e-5)
                np.testing.assert_allclose(ours[:, :, position, 4:], expected.imag, atol=1e-5)
                position += 1
    assert position == pyramid.length


def test_rotated_attention_against_numpy():
    pyramid = Pyramid.parse("1,2x3")
    torch.manual_seed(0)
    layer = Attention(TransformerConfig(depth=1, width=16, heads=2, positions=ROTARY))
    x = torch.randn(1, pyramid.length, 16)
    context = ScaleContext(pyramid, (0, pyramid.length), True, k=1)
    qkv = (x @ layer.qkv.weight.T + layer.join_biases()).view(7, 3, 2, 8)
    q, k, v = (nn.functional.normalize(part, dim=-1) if i < 2 else part for i, part in enumerate(qkv.unbind(1)))
    cos, sin = (t.numpy() for t in compute_rotation(pyramid, ROTARY, 8, x.device))
    out = np.zeros((7, 2, 8))
    for head in range(2):
        turned = [
            (part[:, head, :4].detach().numpy() + 1j * part[:, head, 4:].detach().numpy()) * (cos + 1j * sin)
            for part in (q, k)
        ]
        for i in range(7):
            seen = 1 if i == 0 else 7
            scores = 4 * np.array([(turned[0][i] * turned[1][j].conj()).real.sum() for j in range(seen)])
            weights = np.exp(scores) / np.exp(scores).sum()
            out[i, head] = weights @ v[:seen, head].detach().numpy()
    expected = out.reshape(7, 16) @ layer.proj.weight.detach().numpy().T + layer.proj.bias.detach().numpy()
    np.testing.assert_allclose(layer(x, context, None)[0].detach().numpy(), expected, atol=1e-5)


def test_coordinates_are_shared_by_scales_and_sizes():
    """A coarse cell is turned as the mean place of the cells under it, and all square sizes span the same."""
    cos, sin = compute_rotation(Pyramid.parse("1,2,4,8"), ROTARY, 4, torch.device("cpu"))
    angle = torch.atan2(sin, cos).double() % (2 * math.pi)
    assert angle[1, 0].item() == pytest.approx(4.0)  # a quarter of 16
    assert angle[0, 0].item() == pytest.approx(8.0 - 2 * math.pi)
    assert torch.equal(compute_rotation(Pyramid.parse("8"), ROTARY, 4, torch.device("cpu"))[0], cos[-64:])


def test_sizes_are_embedded_by_sines_and_unknown_at_first():
    layer = SizeEmbedding(5)
    layer.project.weight.data.normal_()
    pyramid = Pyramid.parse("1,2,4x8")
    periods = (2, 4, 8, 16)
    phases = [2 * math.pi * math.log2(n) / p for n in (4, 8, 3) for p in periods]
    sines = np.array([math.sin(a) for a in phases] + [math.cos(a) for a in phases])
    sines = sines.reshape(2, 3, 4).reshape(24)
    expected = layer.project.weight.detach().double().numpy() @ sines + layer.project.bias.detach().numpy()
    np.testing.assert_allclose(layer(pyramid)[0].detach().numpy(), expected, atol=1e-5)
    assert not Pipeline.from_config(tiny_config(positions=SIZED)).transformer.size_embed.project.weight.any()


def test_pyramids_of_a_size():
    known = Pyramid.parse("1,2,3,4"), Pyramid.parse("1,2,4,8,16")
    assert choose_pyramid(known, (8, 8), 2) == known[0]
    assert choose_pyramid(known, (6, 12), 2) == Pyramid.parse("1x2,2x3,2x4,3x6")
    assert choose_pyramid(known, (24, 24), 2) == Pyramid.parse("1,2,3,6,12")
    for wrong in ((7, 8), (0, 8), (1, 1)):
        with pytest.raises(UserError, match="give multiples of 2"):
            choose_pyramid(known, wrong, 2)
    assert Pyramid.parse("1,2,3,4").resize((2, 12)) == Pyramid.parse("1x3,1x6,2x9,2x12")


def test_commands_at_another_size(tiny_folder, tmp_path, capsys):
    out = tmp_path / "grid.png"
    for options, size in ((["--scales", "1,2,3x5"], (6, 10)), (["--size", "12x6"], (12, 6)), (["--size", "8"], (8, 8))):
        tokens = tmp_path / f"{size[0]}.safetensors"
        arguments = ["sample", tiny_folder, "--labels", "1", "--out", out, "--images-out", tmp_path / "images"]
        assert main([str(a) for a in [*arguments, *options, "--tokens-out", tokens, "--overwrite"]]) == 0
    images = open_images(str(tiny_folder), 2, 0, SampleConfig(), 2, scales="1,2,3x5")
    assert images.size == (6, 10)
    assert images.identity()["scales"] == "1,2,3x5"
    assert images.fetch(0, 1).shape == (1, 3, 6, 10)
    for wrong, message in {("--size", "7"): "multiples of 2", ("--scales", "4,2"): "larger than the last"}.items():
        assert main([str(a) for a in ["sample", tiny_folder, "--labels", "1", "--out", out, *wrong]]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="either scales or a size"):
        Pipeline.from_pretrained(tiny_folder).at("1,2", size=4)


@torch.no_grad()
def test_sampling_that_stops_gives_the_first_tokens_and_shrinks_the_image_to_their_size(pipeline):
    whole, part = (pipeline.sample([1, 2], seed=5, stop_at=count) for count in (0, 3))
    assert torch.equal(part.tokens, whole.tokens[:, :14])
    assert torch.equal(pipeline.sample([1, 2], seed=5, stop_at=4).tensor, whole.tensor)
    *_, canvas = list(pipeline.tokenizer.build_canvases(whole.tokens))[:3]
    decoded = (pipeline.tokenizer.decode_features(canvas).clamp(-1, 1) + 1) / 2
    expected = nn.functional.adaptive_avg_pool2d(decoded, 6)
    torch.testing.assert_close(part.tensor, expected, atol=1e-5, rtol=1e-5)
    grown = pipeline.sample([1], seed=5, stop_at=2, growth=True)
    assert [tuple(image.shape) for image in grown.growth] == [(1, 3, 4, 4)] * 2
    first, *others = (sample_flops(pipeline.config, SampleConfig(stop_at=n)) for n in (0, 4, 3, 2, 1))
    assert first == others[0] > others[1] > others[2] > others[3] > 0
    with pytest.raises(UserError, match="stop_at is 5, but the model has 4 scales"):
        pipeline.sample([1], stop_at=5)


def test_measured_images_that_stop_have_their_own_size(tiny_folder):
    images = open_images(str(tiny_folder), 2, 0, SampleConfig(stop_at=2), 2)
    assert images.size == (4, 4)
    assert images.fetch(0, 2).shape == (2, 3, 4, 4)


def test_what_does_not_combine_is_refused(tmp_path):
    rotary = randomised(tiny_config(positions=ROTARY))
    assert "rotary" in find_refusal(Request(SampleConfig(prune=(0.5,)), rotary.transformer.config))
    for config, message in ((rotary.config, "rotary positions"), (tiny_config(positions=SIZED), "embeds sizes")):
        with pytest.raises(UserError, match=message):
            export_official(randomised(config).to_checkpoint(), None, tmp_path / "var.pth")
    with pytest.raises(UserError, match="dynamic experts were made for the scales"):
        randomised(tiny_config(dynamic=DynamicConfig(experts=4, scales=2))).at("1,2")
    with pytest.raises(UserError, match="a multiple of 4"):
        TransformerConfig(depth=1, width=24, heads=4, positions=ROTARY)
    with pytest.raises(UserError, match="a block has none"):
        TransformerConfig(depth=1, width=64, heads=1, mixers=("mamba",), positions=ROTARY)
    with pytest.raises(UserError, match="shares the weights of another"):
        rotary.at("1,2").unload_lora()
