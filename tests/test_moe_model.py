"""Models with mixtures of experts and an alignment head keep every promise of dense ones."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextscale.checkpoints import build_on_meta
from nextscale.checkpoints.adapt import adapt, match_scales
from nextscale.checkpoints.official import export_official
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.reading import read_json
from nextscale.common.registry import ROUTERS
from nextscale.config.initialization import InitConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import AlignmentConfig, ExpertsConfig
from nextscale.info import as_text, describe_config, sample_flops
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.training.engine.optimizer import build_optimizer
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.routers import Routing
from nextscale.transformer.initialization import initialize_transformer
from tests.conftest import check_flops, randomised, tiny_config
from tests.test_routers import admitted_by_loops, chosen_by_loops, gates_by_loops
from tests.test_transformer import gelu, reference_forward, softmax

pytestmark = pytest.mark.usefixtures("seeded")

HEAD = AlignmentConfig(width=6, hidden=8)
STORED = (*ROUTERS.names, "shared")
"""The routers, and STMoE with one scale embedding for all layers."""
FAMILIES = (*STORED, "capacity")
"""These, and MoE++ with experts that drop tokens."""


def moe_config(router, scales="1,2,3,4", *, count=6, active=2, renormalise=False, residual=True, **transformer):
    more = {"capacity_factor": 0.7, "exclude_zero": True} if router == "capacity" else {}
    experts = ExpertsConfig(
        router={"capacity": "moe++", "shared": "stmoe"}.get(router, router),
        share_scale_embedding=router == "shared", count=count, active=active, renormalise=renormalise,
        gating_residual=residual, constant=1, **more,
    )  # fmt: skip
    return tiny_config(scales, **{"experts": experts, "alignment": HEAD, **transformer})


def saved(config, path):
    """A folder with a random model of this config."""
    randomised(config).save_pretrained(path)
    return path


# ---- the function


class MixtureByHand:
    """The FFN of Eq. 6 to 9, or of a rival's paper, for one image in float64: every expert on every token, masked."""

    def __init__(self, config, pyramid, shared_KD=None):
        self.config, self.scale_of, self.shared_KD = config, np.array(pyramid.scale_of_L), shared_KD
        self.pyramid = pyramid
        self.logits = None

    def __call__(self, q, y):
        config, M = self.config, self.config.count
        none_KD = np.zeros((len(self.pyramid), y.shape[1])) if self.shared_KD is None else self.shared_KD
        SE = q.get("ffn.router.scale_embed.weight", none_KD)[self.scale_of]
        before = self.logits
        self.logits = (SE if config.router == "smoe" else SE + y) @ q["ffn.router.score.weight"].T
        if config.router == "moe++" and config.gating_residual and before is not None:
            self.logits = self.logits + before @ q["ffn.router.residual.weight"].T
        scores = softmax(self.logits)
        chosen = chosen_by_loops(config, scores[None], self.pyramid)
        admitted = admitted_by_loops(config, chosen, self.pyramid)
        gates = gates_by_loops(config, scores[None], chosen, admitted)[0]
        out = np.zeros_like(y)
        for j in range(M):
            h = gelu(y @ q["ffn.experts.fc1.weight"][j].T + q["ffn.experts.fc1.bias"][j])
            out += gates[:, j : j + 1] * (h @ q["ffn.experts.fc2.weight"][j].T + q["ffn.experts.fc2.bias"][j])
        if config.zero_computation:  # one that gives nothing, one that gives y, one that mixes it with a vector
            assert (config.zero, config.copy, config.constant) == (1, 1, 1)
            mix = softmax(y @ q["ffn.idle.mix.weight"].T)
            out += gates[:, M + 1, None] * y
            out += gates[:, M + 2, None] * (mix[:, :1] * y + mix[:, 1:] * q["ffn.idle.constant"][0])
        return out


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("router", FAMILIES)
@torch.no_grad()
def test_forward_against_the_formula(router, renormalise):
    """The whole model, in NumPy, image by image."""
    model = randomised(moe_config(router, "1,2x1,3x2", depth=3, renormalise=renormalise)).transformer
    x_BLC = torch.randn(2, model.pyramid.length - 1, 4)
    logits = model(torch.tensor([3, 5]), x_BLC).logits_BNV.double().numpy()
    parameters = {n: t.double().numpy() for n, t in model.state_dict().items()}
    for b, label in enumerate((3, 5)):
        ffn = MixtureByHand(model.config.experts, model.pyramid, parameters.get("router_scales"))
        expected = reference_forward(parameters, model, label, x_BLC[b].double().numpy(), ffn)
        np.testing.assert_allclose(logits[b], expected, atol=2e-5 * np.abs(expected).max())


# ---- in parts


@pytest.mark.parametrize("router", FAMILIES)
@pytest.mark.parametrize("scales", ["1,2,3,4", "4", "2x1,3x2,4x3", "1,1,2,4"])
@torch.no_grad()
def test_cached_steps_and_catching_up_equal_the_full_forward(scales, router):
    pipeline = randomised(moe_config(router, scales, depth=3, renormalise=scales == "4"))
    model, tokenizer = pipeline.transformer, pipeline.tokenizer
    inputs = tokenizer.teacher_inputs(torch.randint(0, 32, (3, model.pyramid.length)))
    values, first = torch.tensor([0, 4, 5]), model.pyramid.counts[0]
    full = model(values, inputs)
    for begin in range(len(model.pyramid)):  # all scales before `begin` at once, the others one by one
        conditioning, cache = model.embed_condition(values), model.new_cache(3)
        for k, (start, end) in enumerate(model.pyramid.spans):
            if k < begin:
                continue
            if k == begin and k > 0:
                step = model.prefill(conditioning, inputs[:, : end - first], k, cache)
                at = 0
            else:
                step = model.step(conditioning, inputs[:, start - first : end - first] if k else None, k, cache)
                at = start
            worst = (step.logits_BNV - full.logits_BNV[:, start:end]).abs().max() / full.logits_BNV.abs().max()
            assert worst <= 1e-5, f"scale {k}: relative difference {worst:.1e}"
            for ours, whole in zip(step.records, full.records, strict=True):
                assert torch.equal(ours.routing.selected_BNM, whole.routing.selected_BNM[:, at:end])


@pytest.mark.parametrize("router", FAMILIES)
@torch.no_grad()
def test_no_scale_sees_a_finer_one(router):
    """Nor do a token's experts depend on what comes later."""
    pipeline = randomised(moe_config(router))
    model, tokens = pipeline.transformer, torch.randint(0, 32, (1, 30))
    before = model(torch.tensor([1]), pipeline.tokenizer.teacher_inputs(tokens))
    for k, (start, end) in enumerate(model.pyramid.spans):
        changed = tokens.clone()
        changed[:, start:end] = (changed[:, start:end] + 7) % 32
        after = model(torch.tensor([1]), pipeline.tokenizer.teacher_inputs(changed))
        assert torch.allclose(after.logits_BNV[:, :end], before.logits_BNV[:, :end], atol=1e-5), k
        for a, b in zip(after.records, before.records, strict=True):
            assert torch.equal(a.routing.selected_BNM[:, :end], b.routing.selected_BNM[:, :end])


@pytest.mark.parametrize("router", ["none", *FAMILIES])
@torch.no_grad()
def test_records_come_back_per_block(router):
    config = moe_config(router, depth=3)
    model = randomised(config).transformer
    output = model(torch.tensor([1, 2]), torch.randn(2, 29, 4))
    experts = config.transformer.experts
    assert len(output.records) == 3
    for record in output.records:
        if router == "none":
            assert record is None
            continue
        routing = record.routing
        assert isinstance(routing, Routing)
        shape = (2, 30, experts.count + experts.zero_computation)
        tensors = [getattr(routing, f.name) for f in dataclasses.fields(routing)]
        assert {tuple(t.shape) for t in tensors if t is not None} == {shape}
        assert (routing.requested_BNM is not None) == (router == "capacity")
    cache, conditioning = model.new_cache(2), model.embed_condition(torch.tensor([1, 2]))
    first = model.step(conditioning, None, 0, cache)
    assert first.projected_BNE is None
    if router != "none":
        assert first.records[2].routing.gates_BNM.shape == (2, 1, experts.count + experts.zero_computation)


@pytest.mark.parametrize("router", FAMILIES)
def test_fast_and_plain_gradients_are_equal(router):
    """A whole model, forward and backward; recomputed blocks too."""
    values, x = torch.tensor([0, 1]), torch.randn(2, 84, 4)
    grads = {}
    for fast in (True, False):
        model = randomised(moe_config(router, "1,2,4,8"), backend="auto" if fast else "plain").transformer
        output = model(values, x, aligned_scales=2)
        balance = sum(r.routing.scores_BNM.square().mean() for r in output.records)
        (output.logits_BNV.square().mean() + output.projected_BNE.square().mean() + balance).backward()
        grads[fast] = {n: p.grad.clone() for n, p in model.named_parameters()}
    for name, fast in grads[True].items():
        plain = grads[False][name]
        assert (fast - plain).abs().max() <= 1e-5 * plain.abs().max().clamp_min(1e-3), name
    assert all(g.abs().max() > 0 for n, g in grads[True].items() if "router" in n), "routers learn"


# ---- at rest


@pytest.mark.parametrize("router", STORED)
def test_checkpoints_go_round(router, tmp_path):
    """With their alignment head; and the same bytes again."""
    pipeline = randomised(moe_config(router), backend="plain")
    pipeline.save_pretrained(tmp_path / "a")
    loaded = Pipeline.from_pretrained(tmp_path / "a", backend="plain")
    assert loaded.config == pipeline.config
    ours, theirs = pipeline.transformer.state_dict(), loaded.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[n], t) for n, t in ours.items())
    assert any(n.startswith("projector.") for n in ours)
    assert torch.equal(loaded.sample([1, 2], seed=3).tensor, pipeline.sample([1, 2], seed=3).tensor)
    loaded.save_pretrained(tmp_path / "b")
    for path in (p for p in (tmp_path / "a").iterdir() if p.suffix != ".md"):  # a card names its folder
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_of_the_other_kind_of_scale_embedding_is_refused(shared, tmp_path):
    folder = saved(moe_config("shared" if shared else "stmoe"), tmp_path / "m")
    head = read_json(folder / "config.json")
    del head["digest"], head["digests"]
    head["model"]["transformer"]["experts"]["share_scale_embedding"] = not shared
    write_json(folder / "config.json", head)
    own, one = "'blocks.0.ffn.router.scale_embed.weight' (4, 32)", "'router_scales' (4, 32)"
    missing, unknown = (own, one) if shared else (one, own)
    message = re.escape(f"does not fit its model: missing tensor {missing}") + ".*" + re.escape(f"tensor {unknown}")
    with pytest.raises(UserError, match=message):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("router", ["stmoe", "smoe"])
def test_layers_that_share_one_scale_embedding_are_layers_that_have_equal_ones(router):
    """In sampling with guidance, float32 and bfloat16: the same tokens, bit for bit."""
    experts = ExpertsConfig(router=router, count=6, active=2, share_scale_embedding=True)
    together = randomised(tiny_config(experts=experts)).to_checkpoint()
    model = dataclasses.replace(
        together.config.transformer, experts=dataclasses.replace(experts, share_scale_embedding=False)
    )
    weights = dict(together.transformer)
    one = weights.pop("router_scales")
    weights |= {f"blocks.{block}.ffn.router.scale_embed.weight": one for block in range(model.depth)}
    config = dataclasses.replace(together.config, transformer=model)
    apart = dataclasses.replace(together, config=config, transformer=weights)
    for dtype in (torch.float32, torch.bfloat16):
        models = [Pipeline.from_checkpoint(checkpoint, dtype=dtype) for checkpoint in (together, apart)]
        a, b = (pipeline.sample([1, 2, 3], cfg=2.0, seed=4).tokens for pipeline in models)
        assert torch.equal(a, b)


@pytest.mark.parametrize("router", ROUTERS.names)
def test_export_official_says_that_there_is_no_such_form(router, tmp_path, capsys):
    folder = saved(moe_config(router), tmp_path / "m")
    arguments = ["export-official", str(folder), "--var", str(tmp_path / "v.pth"), "--vae", str(tmp_path / "t.pth")]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert f"this model is a mixture of experts ({router}), which the official format does not know" in error
    assert not list(tmp_path.glob("*.pth")), "nothing half done"
    assert main(["export-official", str(folder), "--vae", str(tmp_path / "t.pth")]) == 0


def test_export_official_leaves_the_alignment_head_out(tmp_path):
    plain, guided = randomised(tiny_config()), randomised(tiny_config(alignment=HEAD))
    for name, pipeline in (("plain", plain), ("guided", guided)):
        export_official(pipeline.to_checkpoint(), None, tmp_path / f"{name}.pth")
    names = [torch.load(tmp_path / f"{n}.pth", weights_only=True).keys() for n in ("plain", "guided")]
    assert names[0] == names[1]


@pytest.mark.parametrize("router", STORED)
@pytest.mark.parametrize("scales", ["1,2,3,4,6", "1,4", "1,2,3,4"])
def test_adapted_to_other_scales_routers_keep_what_they_know_of_each(router, scales, tmp_path):
    checkpoint = randomised(moe_config(router)).to_checkpoint()
    pyramid = Pyramid.parse(scales)
    adapted = adapt(checkpoint, None, pyramid)
    assert Pipeline.from_checkpoint(adapted).sample([1]).tensor.isfinite().all()
    names = [n for n in checkpoint.transformer if n.endswith(("router.scale_embed.weight", "router_scales"))]
    assert len(names) == {"stmoe": 2, "smoe": 2, "shared": 1}.get(router, 0)
    for name in names:
        source = match_scales(checkpoint.config.pyramid, pyramid)
        assert torch.equal(adapted.transformer[name], checkpoint.transformer[name][source])


# ---- what it costs


COSTS = [
    {"count": 6, "active": 2},
    {"count": 5, "active": 4, "scale_embedding": False, "gating_residual": False},
    {"count": 3, "active": 3, "constant": 0, "share_scale_embedding": True},
    {"count": 6, "active": 2, "capacity_factor": 0.6},
]


@pytest.mark.parametrize("router", ROUTERS.names)
@pytest.mark.parametrize("experts", COSTS)
@torch.no_grad()
def test_structural_count_equals_torch_s_counter(router, experts):
    """Without storage every router's experts take as many pairs as there may be, evenly; so for idle experts (moe++)
    the figure is that of no token choosing one, and what a real pass takes is below it."""
    config = tiny_config("1,2x3,4", experts=ExpertsConfig(router=router, **experts))
    check_flops(config)
    _, model = build_on_meta(config)
    inputs = [torch.empty(2, n, 4, device="meta") for n in config.pyramid.counts[1:]]
    with FlopCounterMode(display=False) as counter:
        conditioning, cache = (
            model.embed_condition(torch.zeros(2, dtype=torch.int64, device="meta")),
            model.new_cache(2),
        )
        for k in range(3):
            model.step(conditioning, inputs[k - 1] if k else None, k, cache)
    scored_once = sum(scored_scale_embeddings(config) for _ in range(3))  # for the whole batch, not for each image
    assert counter.get_total_flops() == sample_flops(config, SampleConfig(cfg=1.5)) - scored_once


def scored_scale_embeddings(config):
    """FLOPs per scale of scoring the scale embeddings, which all sequences of a batch share."""
    model, experts = config.transformer, config.transformer.experts
    if experts.router == "smoe" or (experts.router == "stmoe" and experts.scale_embedding):
        return model.depth * 2 * len(config.pyramid) * model.width * experts.count
    return 0


@torch.no_grad()
def test_a_pass_takes_at_most_what_info_says():
    """moe++ on real tokens: pairs with idle experts cost nothing, so the pairs counted stay below."""
    config = moe_config("moe++")
    output = randomised(config).transformer(torch.tensor([1, 2]), torch.randn(2, 29, 4))
    experts = config.transformer.experts
    for routing in collect(output.records, "routing"):
        pairs = routing.selected_BNM[..., : experts.count].sum().item()
        assert 0 < pairs < 2 * 30 * experts.active
        assert routing.selected_BNM.sum() == 2 * 30 * experts.active


@pytest.mark.parametrize("router", ["none", *STORED])
def test_active_parameters_are_all_but_the_experts_at_rest(router):
    config = moe_config(router, count=6, active=2)
    model = randomised(config).transformer
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    facts = describe_config("m", config)
    assert facts["transformer_parameters"] == total
    assert facts["active_parameters"] == total - experts * 4 // 6
    assert ("of them active" in as_text(facts)) == (router != "none")
    most = describe_config("m", moe_config("moe++", count=2, active=5))
    assert most["active_parameters"] == most["transformer_parameters"], "never more than there are"


# ---- beginnings


@pytest.mark.parametrize("router", STORED)
def test_experts_begin_as_dense_layers_do_and_apart(router):
    model = randomised(moe_config(router, depth=4, width=64)).transformer
    initialize_transformer(model, InitConfig(), torch.Generator().manual_seed(1))
    std = math.sqrt(1 / (3 * 64))
    for block in model.blocks:
        experts = block.ffn.experts
        for weight, expected in ((experts.fc1.weight, std), (experts.fc2.weight, std / math.sqrt(2 * 4))):
            assert torch.allclose(weight.std(dim=(1, 2)), torch.tensor(expected), rtol=0.1)
            assert not torch.equal(weight[0], weight[1])
        assert max(experts.fc1.bias.abs().max(), experts.fc2.bias.abs().max()) == 0
        assert abs(block.ffn.router.score.weight.std().item() / std - 1) < 0.2
        if router in ("stmoe", "smoe", "shared"):
            embedded = model.router_scales if router == "shared" else block.ffn.router.scale_embed.weight
            assert abs(embedded.std().item() - 1) < 0.2


@pytest.mark.parametrize("router", STORED)
def test_weight_decay_reaches_matrices_alone(router):
    """A stack's biases and a constant expert's vector have two dimensions, and are none."""
    model = randomised(moe_config(router)).transformer
    decayed = {id(p) for p in build_optimizer(model, TrainConfig()).param_groups[0]["params"]}
    spared = {n for n, p in model.named_parameters() if id(p) not in decayed and p.ndim >= 2}
    ends = {n.split(".", 2)[2] for n in spared if n.startswith("blocks.")} - {"mixers.0.log_scale"}
    expected = {"ffn.experts.fc1.bias", "ffn.experts.fc2.bias"}
    expected |= {"ffn.router.scale_embed.weight"} if router in ("stmoe", "smoe") else set()
    expected |= {"ffn.idle.constant"} if router == "moe++" else set()
    assert ends == expected
    assert ("router_scales" in spared) == (router == "shared")
