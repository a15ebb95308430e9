"""Low-rank adapters: what they compute against NumPy, every family, every precision, and what is refused."""

import json

import numpy as np
import pytest
import torch

from nextscale.backends import optimize
from nextscale.checkpoints.lora import Adapter, compute_base_fingerprint, write_adapter
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.lora import NEW_ROWS, LoraConfig, parse_source
from nextscale.config.transformer import MVAR_MIXERS, ExpertsConfig, MambaConfig
from nextscale.pipeline import Pipeline
from nextscale.transformer.lora import add_adapters
from tests.conftest import randomised, tiny_config

FAMILIES = {
    "dense": {},
    "mixture": {"experts": ExpertsConfig(router="moe++", count=4, active=2)},
    "mvar": {"mixers": MVAR_MIXERS, "mamba": MambaConfig(state_width=6, head_width=8)},
}


def draw_adapter(pipeline, rank=3, alpha=6.0, classes=(), seed=0, layers=("mixers", "ffn"), where="model"):
    """An adapter of random values for a model, made of the layers that training would adapt."""
    config = LoraConfig(rank=rank, alpha=alpha, layers=layers)
    checkpoint = pipeline.to_checkpoint()
    model = Pipeline.from_checkpoint(checkpoint, backend="plain").transformer
    rows = torch.zeros(len(classes), 32) if classes else None
    generator = torch.Generator().manual_seed(seed)
    add_adapters(model, config, rows, generator)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in trained.items()}
    base = {"where": where, "fingerprint": compute_base_fingerprint(checkpoint)}
    return Adapter(config, tuple(classes), base, tensors)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder with model, cat and ink, the model, the two adapters)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = randomised(tiny_config(**FAMILIES[request.param]))
    pipeline.save_pretrained(folder / "model")
    adapters = draw_adapter(pipeline, classes=("cat",)), draw_adapter(pipeline, rank=2, seed=1, layers=("ffn",))
    for name, adapter in zip(("cat", "ink"), adapters, strict=True):
        write_adapter(folder / name, adapter)
    return folder, pipeline, adapters


def list_weights(pipeline):
    return {name: tensor.clone() for name, tensor in pipeline.to_checkpoint().transformer.items()}


def add_by_numpy(weights, given):
    """W + weight alpha / rank B A, expert by expert, in float64."""
    out = {name: tensor.numpy().astype(np.float64) for name, tensor in weights.items()}
    for adapter, weight in given:
        for name, a in adapter.tensors.items():
            if not name.endswith("lora_A"):
                continue
            layer, scale = name.removesuffix(".lora_A"), weight * adapter.config.alpha / adapter.config.rank
            a, b = a.double().numpy(), adapter.tensors[f"{layer}.lora_B"].double().numpy()
            if a.ndim == 3:
                for expert in range(len(a)):
                    out[f"{layer}.weight"][expert] += scale * b[expert] @ a[expert]
            else:
                out[f"{layer}.weight"] += scale * b @ a
    return out


def test_merged_weights_are_those_of_the_formula(family):
    folder, pipeline, (cat, ink) = family
    before = list_weights(pipeline)
    expected = add_by_numpy(before, [(cat, 0.5), (ink, -2.0)])
    old = expected["condition.embedding.weight"]
    expected["condition.embedding.weight"] = np.concatenate([old[:-1], cat.tensors[NEW_ROWS].numpy(), old[-1:]])
    merged = Pipeline.from_pretrained(folder / "model", lora=[f"{folder}/cat:0.5", f"{folder}/ink:-2"])
    after = list_weights(merged)
    assert after.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(after[name].numpy(), values, rtol=1e-6, atol=1e-6, err_msg=name)
    changed = {
        name for name in before if after[name].shape != before[name].shape or not after[name].equal(before[name])
    }
    assert changed == {f"{layer}.weight" for layer in cat.layers} | {"condition.embedding.weight"}
    assert merged.config.class_names == ("0", "1", "2", "3", "4", "cat")


@pytest.mark.parametrize("backend", ["plain", "auto"])
def test_trained_layers_compute_what_the_merged_ones_do(family, backend):
    """Logits, and gradients of A and B by autograd through the formula."""
    folder, pipeline, (cat, _) = family
    merged = Pipeline.from_pretrained(folder / "model", lora=[f"{folder}/cat"], backend="plain")
    model = Pipeline.from_checkpoint(pipeline.to_checkpoint(), backend="plain").transformer
    add_adapters(model, cat.config, torch.zeros(1, 32), torch.Generator())
    model.load_state_dict(cat.tensors, strict=False)
    optimize(model, backend, training=True)
    labels, inputs = torch.tensor([0, 5, 6]), torch.randn(3, 29, 4, generator=torch.Generator().manual_seed(0))
    ours = model(labels, inputs).logits_BNV
    theirs = merged.transformer(labels, inputs).logits_BNV
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()
    ours.square().sum().backward()
    theirs.square().sum().backward()
    layers = dict(merged.transformer.named_parameters())
    for layer in cat.layers:
        a, b = (cat.tensors[f"{layer}.lora_{part}"] for part in "AB")
        full, scale = layers[f"{layer}.weight"].grad, cat.config.alpha / cat.config.rank
        for part, expected in (("A", scale * b.mT @ full), ("B", scale * full @ a.mT)):
            gradient = model.get_parameter(f"{layer}.lora_{part}").grad
            assert (gradient - expected).abs().max() <= 2e-3 * expected.abs().max(), (layer, part)
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= cat.tensors.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_adapters_are_switched_and_removed_bit_for_bit(family, dtype, tmp_path):
    """Loading after sampling, when weights are packed, equals loading first and a merged folder."""
    folder, _, _ = family
    cat, ink = f"{folder}/cat", f"{folder}/ink"
    pipeline = Pipeline.from_pretrained(folder / "model", dtype=dtype)
    plain, draw = pipeline.sample([0, 1, 2], seed=1), {"seed": 1, "cfg": 1.0}
    assert pipeline.load_lora(f"{cat}:0.3", ink).sample(["cat", 0], **draw).tensor.isfinite().all()
    switched = pipeline.load_lora(cat, weight=0.5).unload_lora(ink).sample(["cat", 0], **draw)
    command = ["merge-lora", f"{folder}/model", "--lora", f"{cat}:0.5", "--out", str(tmp_path / "merged")]
    assert main(command) == 0
    for other in (
        Pipeline.from_pretrained(folder / "model", dtype=dtype, lora=[f"{cat}:0.5"]),
        Pipeline.from_pretrained(tmp_path / "merged", dtype=dtype),
    ):
        images = other.sample(["cat", 0], **draw)
        assert torch.equal(images.tokens, switched.tokens)
        assert torch.equal(images.tensor, switched.tensor)
    again = pipeline.unload_lora().sample([0, 1, 2], seed=1)
    assert torch.equal(again.tensor, plain.tensor)
    assert pipeline.config.class_names == ()


def test_a_model_in_memory_takes_adapters_and_saves_merged(tmp_path):
    pipeline = randomised(tiny_config())
    write_adapter(tmp_path / "cat", draw_adapter(pipeline, classes=("cat",)))
    before = list_weights(pipeline)
    pipeline.load_lora(tmp_path / "cat").save_pretrained(tmp_path / "merged")
    merged = Pipeline.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.sample(["cat"]).tensor, pipeline.sample(["cat"]).tensor)
    assert merged.to_checkpoint().origin["adapters"][0]["weight"] == 1.0
    after = list_weights(pipeline.unload_lora())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_adapters_work_with_editing_pruning_a_refiner_and_captured_steps(tmp_path):
    """Each equals the same with the merged folder: an adapter is a part of the weights."""
    pipeline = randomised(tiny_config())
    pipeline.save_pretrained(tmp_path / "model")
    write_adapter(tmp_path / "cat", draw_adapter(pipeline, classes=("cat",)))
    pipeline.load_lora(tmp_path / "cat").save_pretrained(tmp_path / "merged")
    ours = Pipeline.from_pretrained(tmp_path / "model", lora=[str(tmp_path / "cat")])
    theirs = Pipeline.from_pretrained(tmp_path / "merged")
    mask, image = torch.eye(8), torch.rand(1, 3, 8, 8)
    for use in (
        lambda p: p.edit(image[0], mask, "cat", seed=3),
        lambda p: p.sample(["cat", 1], prune=(0.5,)),
        lambda p: p.sample(["cat", 1], refiner=str(tmp_path / "merged"), draft_scales=2),
        lambda p: p.capture("on").sample(["cat", 1]),
    ):
        assert torch.equal(use(ours).tensor, use(theirs).tensor)
    assert torch.equal(ours.score(image, ["cat"]), theirs.score(image, ["cat"]))


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    pipeline = randomised(tiny_config())
    pipeline.save_pretrained(tmp_path / "model")
    randomised(tiny_config(), seed=1).save_pretrained(tmp_path / "other")
    write_adapter(tmp_path / "cat", draw_adapter(pipeline, classes=("cat",)))
    write_adapter(tmp_path / "Cat", draw_adapter(pipeline, classes=("Cat",)))
    assert main(["quantise", str(tmp_path / "model"), "--out", str(tmp_path / "int8")]) == 0

    def load(model, *names):
        Pipeline.from_pretrained(tmp_path / model, lora=[str(tmp_path / name) for name in names])

    with pytest.raises(UserError, match="trained for another model.*model, fingerprint"):
        load("other", "cat")
    with pytest.raises(UserError, match="cannot be added to linear layers in 8 bits"):
        load("int8", "cat")
    with pytest.raises(UserError, match="a class named Cat already"):
        load("model", "cat", "Cat")
    with pytest.raises(UserError, match="is no adapter: it holds a nextscale checkpoint"):
        load("model", "other")
    with pytest.raises(UserError, match="finite number"):
        load("model", "cat:nan")
    with pytest.raises(UserError, match="no adapter x is loaded; loaded are: none"):
        Pipeline.from_pretrained(tmp_path / "model").unload_lora("x")
    with pytest.raises(UserError, match="give its model, and the adapter with --lora"):
        Pipeline.from_pretrained(tmp_path / "cat")
    sample = ["sample", str(tmp_path / "model"), "--labels", "0", "--out", str(tmp_path / "a.png")]
    assert main([*sample, "--lora", str(tmp_path / "cat"), "--profile", "fast"]) == 2
    assert "profile fast was found for the model without adapters" in capsys.readouterr().err
    damage(tmp_path / "cat" / "lora.safetensors")
    with pytest.raises(UserError, match="does not match its digest"):
        load("model", "cat")


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_model_stored_in_16_bits_takes_the_adapter(tmp_path):
    pipeline = randomised(tiny_config())
    write_adapter(tmp_path / "cat", draw_adapter(pipeline, classes=("cat",)))
    small = pipeline.to(pipeline.device, torch.bfloat16)
    assert small.load_lora(tmp_path / "cat").sample(["cat"]).tensor.isfinite().all()


def test_sources_are_parsed():
    assert parse_source("runs/cat:0.5") == ("runs/cat", 0.5)
    assert parse_source("runs/cat") == ("runs/cat", 1.0)
    assert parse_source("runs/a:b", 2.0) == ("runs/a:b", 2.0)


def test_the_rank_must_fit():
    model = randomised(tiny_config()).transformer
    with pytest.raises(UserError, match="lora.rank 33 is more than a layer of 32 inputs"):
        add_adapters(model, LoraConfig(rank=33), None, torch.Generator())


def test_info_and_verify_know_adapters(tmp_path, capsys):
    write_adapter(tmp_path / "cat", draw_adapter(randomised(tiny_config()), classes=("cat",)))
    assert main(["info", str(tmp_path / "cat")]) == 0
    assert "rank 3" in (text := capsys.readouterr().out)
    assert "cat" in text
    assert main(["info", str(tmp_path / "cat"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["cat"]
    assert main(["info", str(tmp_path / "cat"), "--verify"]) == 0
    assert "2 files match" in capsys.readouterr().out
