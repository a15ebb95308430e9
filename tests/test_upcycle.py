"""Sparse upcycling: at step 0 the mixture is the dense model, and from there it trains."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.checkpoints.official import import_official
from nextscale.checkpoints.official_shapes import Hints
from nextscale.checkpoints.upcycle import upcycle
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.transformer import AlignmentConfig, ExpertsConfig
from nextscale.info import count_active_parameters
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config
from tests.test_data import write_folder

pytestmark = pytest.mark.usefixtures("seeded")


def run(text: str) -> int:
    return main(text.split())


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def compute_logits(pipeline, values, inputs):
    with torch.no_grad():
        return pipeline.transformer(values, inputs).logits_BNV


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["stmoe", "smoe"]), st.integers(1, 8), st.data(), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_outputs_equal_the_dense_model_s(router, count, data, embedded, shared, seed):
    active = data.draw(st.integers(1, count))
    dense = randomised(tiny_config(depth=3))
    experts = ExpertsConfig(
        router=router, count=count, active=active, scale_embedding=embedded, share_scale_embedding=shared
    )
    after = upcycle(dense.to_checkpoint(), experts, seed)
    assert after.config.transformer.experts == replace(experts, renormalise=True)
    mixture = Pipeline.from_checkpoint(after)
    inputs, values = torch.randn(3, 29, 4), torch.tensor([0, 3, 5])
    expected = compute_logits(dense, values, inputs)
    assert largest_difference(compute_logits(mixture, values, inputs), expected) <= 1e-5
    total = sum(p.numel() for p in mixture.transformer.parameters())
    ffn = 2 * 32 * 128 + 128 + 32
    routers = sum(
        p.numel() for n, p in mixture.transformer.named_parameters() if ".router." in n or n.startswith("router_scales")
    )
    dense_size = sum(p.numel() for p in dense.transformer.parameters())
    assert total == dense_size + 3 * (count - 1) * ffn + routers
    assert count_active_parameters(after.config, total) == dense_size + 3 * (active - 1) * ffn + routers


def test_samples_and_likelihoods_equal_the_dense_model_s(official):
    """Published form: all variants of the official fixtures, shared adaLN and both attention scalings among them."""
    before = import_official(*official.files, Hints(heads=official.meta["num_heads"]))
    dense = Pipeline.from_checkpoint(before)
    mixture = Pipeline.from_checkpoint(upcycle(before, ExpertsConfig(router="stmoe")))
    labels = official.io["in.label"]
    assert torch.equal(mixture.sample(labels, seed=1).tokens, dense.sample(labels, seed=1).tokens)
    inputs = official.io["out.teacher_forcing_input"]
    assert largest_difference(compute_logits(mixture, labels, inputs), compute_logits(dense, labels, inputs)) <= 1e-5


def test_everything_else_is_kept_and_experts_are_copies():
    before = randomised(tiny_config(alignment=AlignmentConfig(width=6, hidden=8))).to_checkpoint()
    after = upcycle(before, ExpertsConfig(router="smoe", count=4, active=2, share_scale_embedding=True))
    one = after.transformer.pop("router_scales")
    assert one.std() > 0.5, "drawn as in training from scratch: as large as normalised tokens"
    copied = 0
    for name, tensor in before.transformer.items():
        if ".ffn." not in name:
            assert torch.equal(after.transformer.pop(name), tensor)
            continue
        stack = after.transformer.pop(name.replace(".ffn.", ".ffn.experts."))
        assert stack.shape == (4, *tensor.shape)
        assert all(torch.equal(stack[j], tensor) for j in range(4))
        copied += 1
    assert copied == 2 * 4
    assert all(".ffn.router." in name for name in after.transformer), "nothing else is new"
    assert after.tokenizer.keys() == before.tokenizer.keys()
    assert all(torch.equal(after.tokenizer[n], t) for n, t in before.tokenizer.items())


def test_stored_precision_is_kept():
    before = randomised(tiny_config()).to_checkpoint()
    before.transformer = {n: t.bfloat16() for n, t in before.transformer.items()}
    after = upcycle(before, ExpertsConfig(router="stmoe"), noise=0.1)
    for name, tensor in after.transformer.items():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name


def test_a_seed_fixes_routers_and_noise_and_tells_them_apart():
    before = randomised(tiny_config()).to_checkpoint()
    a, again, b = (upcycle(before, ExpertsConfig(router="stmoe"), seed, noise=0.01) for seed in (0, 0, 1))
    drawn = [n for n in a.transformer if ".router." in n or (".experts." in n and n.endswith("weight"))]
    assert len(drawn) == 2 * 4
    for name, tensor in a.transformer.items():
        assert torch.equal(again.transformer[name], tensor)
        assert torch.equal(b.transformer[name], tensor) == (name not in drawn)
    first, second = (a.transformer[f"blocks.{i}.ffn.router.score.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert abs(first.std().item() / (1 / (3 * 32)) ** 0.5 - 1) < 0.2, "as a router of its own begins"


def test_noise_is_of_the_given_share():
    before = randomised(tiny_config()).to_checkpoint()
    after = upcycle(before, ExpertsConfig(router="stmoe", count=6), noise=0.05)
    dense = before.transformer["blocks.1.ffn.fc1.weight"]
    stack = after.transformer["blocks.1.ffn.experts.fc1.weight"]
    added = stack - dense
    assert (added.std() / dense.std()).item() == pytest.approx(0.05, rel=0.05)
    assert torch.corrcoef(added.flatten(1)).fill_diagonal_(0).abs().max() < 0.1, "each copy has its own"
    biases = after.transformer["blocks.1.ffn.experts.fc1.bias"]
    assert (biases == before.transformer["blocks.1.ffn.fc1.bias"]).all()


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ("expert-choice", "a token that no expert takes would get nothing"),
        ("moe\\+\\+", "a token that selects zero-computation experts would get only a part"),
        ("none", "it is the dense FFN itself"),
    ],
)
def test_routers_that_cannot_equal_the_dense_model_are_refused(router, reason):
    before = randomised(tiny_config()).to_checkpoint()
    with pytest.raises(UserError, match=f"experts.router '{router}' .*{reason}; routers that do: stmoe, smoe"):
        upcycle(before, ExpertsConfig(router=router.replace("\\", "")))


def test_what_cannot_be_upcycled_is_named(tmp_path, capsys):
    def fails(arguments):
        assert run(f"upcycle {arguments} --out {tmp_path / 'out'}") == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    dense, mixture = randomised(tiny_config()), randomised(tiny_config(experts=ExpertsConfig(router="smoe")))
    dense.save_pretrained(tmp_path / "dense")
    mixture.save_pretrained(tmp_path / "mixture")
    alone = dense.to_checkpoint()
    Pipeline(replace(alone.config, transformer=None), dense.tokenizer, None).save_pretrained(tmp_path / "tokenizer")
    assert "is a mixture of experts already (smoe); upcycling needs a dense one" in fails(tmp_path / "mixture")
    assert "tokenizer alone: there is no transformer to upcycle" in fails(tmp_path / "tokenizer")
    assert "there is no checkpoint folder" in fails(tmp_path / "nothing")
    assert "noise must be 0 or more; got -1.0" in fails(f"{tmp_path / 'dense'} --noise -1")
    assert "renormalise must stay true" in fails(f"{tmp_path / 'dense'} --experts.no-renormalise")
    assert "experts.router 'moe++'" in fails(f"{tmp_path / 'dense'} --experts.router moe++")
    assert not (tmp_path / "out").exists()


def test_an_upcycled_model_samples_and_is_trained_on(tmp_path, monkeypatch, capsys):
    """From the command line: the first loss is the dense model's, and copies part without any noise."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos")
    randomised(tiny_config()).save_pretrained("model")
    assert run("adapt model --classes cat,dog --out dense") == 0
    assert run("upcycle dense --experts.router stmoe --experts.count 4 --experts.active 2 --out experts") == 0
    assert "wrote experts: 4 experts, 2 active; 2 classes" in capsys.readouterr().out
    assert run("sample experts --labels cat,none --out grid.png") == 0
    settings_ = {
        "images": {"held_out": 0.25},
        "loss": {"balance": 0.0},
        "train": {"steps": 3, "batch_size": 6, "save_every": 3, "log_every": 1, "warmup_steps": 1},
    }
    (tmp_path / "c.json").write_text(json.dumps(settings_))
    for start in ("dense", "experts"):
        assert run(f"train c.json --data photos --start {start} --out from-{start} --device cpu") == 0
    logs = [[r for r in read_log(tmp_path / f"from-{n}" / "log.jsonl") if "loss" in r] for n in ("dense", "experts")]
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-5)
    assert len(logs[1][0]["expert_load"]) == 4
    tuned = Pipeline.from_pretrained("from-experts", backend="plain")
    assert tuned.config.transformer.experts == ExpertsConfig(router="stmoe", count=4, active=2, renormalise=True)
    for block in tuned.transformer.blocks:
        weights = block.ffn.experts.fc1.weight
        assert all(not torch.equal(weights[i], weights[j]) for i in range(4) for j in range(i))
    assert run("sample from-experts --labels dog --out grid.png") == 0
