"""The sampling loop against the algorithm written out; schedules, processors of one's own, and what may be combined."""

import doctest
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import nextscale.sampling.filters
from nextscale.cli.parser import main, parse
from nextscale.common.errors import UserError
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import MVAR_MIXERS, ExpertsConfig, MambaConfig, PositionConfig
from nextscale.pipeline import Pipeline
from nextscale.sampling import build_sampler
from nextscale.sampling.combinations import REFUSED, Request, check_combinations
from nextscale.sampling.sampler import sample_images
from tests.conftest import randomised, tiny_config
from tests.test_random import word_by_loop

K = 4


def draw(probabilities, number: int, start: int, seed: int) -> torch.Tensor:
    """One token per row, of positions from `start` on: the first whose cumulative probability exceeds the image's
    uniform number."""
    u = [word_by_loop(seed, "token", number, 0, start + n) / 2**32 for n in range(len(probabilities))]
    cumulative = np.cumsum(probabilities.double().numpy(), axis=1)
    return torch.tensor([int((row <= x * row[-1]).sum()) for row, x in zip(cumulative, u, strict=True)])


def filter_row(row: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The row with -inf where top-k and then top-p leave a token out, by walking up from the least likely."""
    order = row.argsort(descending=True).tolist()
    kept = set(order[:top_k] if top_k else order)
    row = torch.tensor([x if i in kept else -torch.inf for i, x in enumerate(row.tolist())])
    total, probability = 0.0, row.softmax(0).tolist()
    for i in reversed(order[1:] if top_p else []):
        total += probability[i]
        if i in kept and total <= 1 - top_p:
            row[i] = -torch.inf
    return row


@torch.no_grad()
def sample_by_hand(pipeline, label: int, number: int, seed: int, cfg, temperature, top_k, top_p, smooth=False):
    """Image `number` by VAR's algorithm without cache, batch or classes of ours; each setting lists K numbers."""
    tokenizer, model = pipeline.tokenizer, pipeline.transformer
    canvas, inputs, tokens = tokenizer.new_canvas(1), [], []
    for k, (start, end) in enumerate(model.pyramid.spans):
        packed = torch.cat([*inputs, torch.zeros(1, model.pyramid.length - end, 4)], dim=1)
        given, free = (model(torch.tensor([v]), packed).logits_BNV[0, start:end] for v in (label, 5))
        logits = (1 + cfg[k]) * given - cfg[k] * free
        logits = torch.stack([filter_row(row / temperature[k], top_k[k], top_p[k]) for row in logits])
        tokens.append(draw(logits.softmax(-1), number, start, seed))
        codes = tokenizer.quantizer.codebook.weight[tokens[-1]]
        if smooth:
            ratio = k / (K - 1)
            words = [[word_by_loop(seed, "gumbel", number, i, v) for v in range(32)] for i in range(start, end)]
            noise = -(-((torch.tensor(words) // 2**9 + 0.5) / 2**23).log()).log()
            noisy = (logits * (1 + ratio) + noise) / max(0.27 * (1 - ratio * 0.95), 0.005)
            codes = noisy.softmax(-1) @ tokenizer.quantizer.codebook.weight
        canvas = tokenizer.add_codes(canvas, codes[None], k)
        if k + 1 < K:
            inputs.append(tokenizer.next_input(canvas, k + 1))
    return torch.cat(tokens), (tokenizer.decode_canvas(canvas)[0] + 1) / 2


@pytest.mark.parametrize("smooth", [False, True])
def test_the_loop_against_the_algorithm_written_out(tiny, smooth):
    images = tiny.sample([3, 1], cfg=2.0, temperature=1.2, top_k=20, top_p=0.9, seed=3, smooth=smooth)
    for i, label in enumerate([3, 1]):
        cfg = [2.0 * k / (K - 1) for k in range(K)]
        tokens, image = sample_by_hand(tiny, label, i, 3, cfg, [1.2] * K, [20] * K, [0.9] * K, smooth)
        assert torch.equal(images.tokens[i], tokens)
        assert (images.tensor[i] - image).abs().max() <= 1e-5


SCHEDULES = {
    "cfg": [0.0, 3.0, 1.0, 0.5],
    "temperature": [1.0, 0.7, 1.3, 0.9],
    "top_k": [0, 5, 32, 3],
    "top_p": [0.5, 0.0, 0.8, 1.0],
}


def test_a_list_gives_each_scale_its_number(tiny):
    """All four at once against the loop by hand; as lists, as a function of the scale, and as settings."""
    images = tiny.sample([2, 4], seed=5, **SCHEDULES)
    for i, label in enumerate([2, 4]):
        assert torch.equal(images.tokens[i], sample_by_hand(tiny, label, i, 5, **SCHEDULES)[0])
    functions = {name: values.__getitem__ for name, values in SCHEDULES.items()}
    assert torch.equal(tiny.sample([2, 4], seed=5, **functions).tokens, images.tokens)
    settings = SampleConfig(seed=5, **{name: tuple(values) for name, values in SCHEDULES.items()})
    assert torch.equal(tiny.sample([2, 4], settings).tokens, images.tokens)
    steps = tiny.sample_scales([2, 4], settings)
    assert torch.equal(torch.cat([step.tokens_BN for step in steps], dim=1), images.tokens)


@pytest.mark.parametrize(("name", "number"), [("temperature", 0.8), ("top_k", 7), ("top_p", 0.6)])
def test_a_list_of_equal_numbers_is_the_number(tiny, name, number):
    one, many = (tiny.sample([1, 2], seed=1, **{name: value}) for value in (number, [number] * K))
    assert torch.equal(one.tokens, many.tokens)
    assert not torch.equal(one.tokens, tiny.sample([1, 2], seed=1).tokens)


def test_one_number_for_guidance_grows_and_a_list_does_not(tiny):
    grown = tiny.sample([1, 2], seed=1, cfg=3.0)
    assert torch.equal(grown.tokens, tiny.sample([1, 2], seed=1, cfg=[3.0 * k / (K - 1) for k in range(K)]).tokens)
    constant = next(iter(tiny.sample_scales([1], cfg=[3.0] * K)))
    assert not torch.allclose(constant.logits_BNV, next(iter(tiny.sample_scales([1], cfg=3.0))).logits_BNV)
    off = tiny.sample([1, 2], seed=1, cfg=[0.0] * K)
    assert torch.equal(off.tokens, tiny.sample([1, 2], seed=1, cfg=0).tokens)


@pytest.mark.parametrize("name", SCHEDULES)
def test_lists_of_another_length_are_refused(tiny, name):
    with pytest.raises(UserError, match=f"{name} lists 3 numbers, but the model has 4 scales"):
        tiny.sample([1], **{name: SCHEDULES[name][:3]})
    bad = {"cfg": -1.0, "temperature": 0.0, "top_k": -1, "top_p": 2.0}[name]
    with pytest.raises(UserError, match=f"{name} must"):
        SampleConfig(**{name: (bad, *SCHEDULES[name][1:])})


def test_schedules_from_files_and_from_the_command_line(tiny_folder, tmp_path, capsys):
    settings = SampleConfig(**{name: tuple(values) for name, values in SCHEDULES.items()})
    assert from_dict(SampleConfig, json.loads(json.dumps(to_dict(settings)))) == settings
    assert from_dict(SampleConfig, {"cfg": 2, "top_k": 3}) == SampleConfig(cfg=2.0, top_k=3)
    for bad in ([1, "x"], "x", [1.5, [2]]):
        with pytest.raises(UserError, match="config.cfg"):
            from_dict(SampleConfig, {"cfg": bad})
    out = ["--labels", "1", "--out", str(tmp_path / "grid.png")]
    words = {
        ("--cfg", "2.5", "m"): {"cfg": 2.5},  # a word behind an option that may be a list stays a word
        ("--top-k", "7", "m", "--cfg", "0", "0.5", "1", "2"): {"top_k": 7, "cfg": (0, 0.5, 1, 2)},
        ("m", "--cfg", "0,0.5,1,2"): {"cfg": (0, 0.5, 1, 2)},
        ("m", "--cfg=0,0.5,1,2", "--temperature=1"): {"cfg": (0, 0.5, 1, 2), "temperature": 1},
        ("--tau", "0.8,0.7", "m"): {"tau": (0.8, 0.7)},
        ("--prune", "0.4", "0.5", "m", "--top_p", "0.5,1"): {"prune": (0.4, 0.5), "top_p": (0.5, 1)},
    }
    for given, expected in words.items():
        command = parse(["sample", *given, *out])
        assert (command.model, command.settings) == ("m", SampleConfig(**expected))
    config = tmp_path / "settings.yaml"
    config.write_text("cfg: [0, 1, 2, 3]\ntemperature: 0.9\n")
    assert main(["sample", str(tiny_folder), *out, "--config", str(config), "--temperature", "1"]) == 0
    assert main(["sample", str(tiny_folder), *out, "--cfg", "1", "2"]) == 2
    assert "cfg lists 2 numbers, but the model has 4 scales" in capsys.readouterr().err


def test_processors_of_one_s_own_come_after_guidance_and_before_the_filters(tiny):
    seen = []

    def favour_token_3(logits_BNV, k):
        seen.append((k, logits_BNV))
        return logits_BNV + 100 * torch.nn.functional.one_hot(torch.tensor(3), 32)

    options = {"cfg": 2.0, "temperature": 0.5, "seed": 1, "logits_processors": [favour_token_3, lambda x, k: x * 1]}
    steps = list(tiny.sample_scales([1, 2], **options))
    assert [k for k, _ in seen] == list(range(K))
    for step, (_, logits) in zip(steps, seen, strict=True):
        assert torch.equal(step.logits_BNV, logits), "a processor sees guided logits"
        assert (step.tokens_BN == 3).all()
    assert (tiny.sample([1, 2], **options).tokens == 3).all()
    edited = tiny.edit(tiny.sample([1]).pil()[0], torch.zeros(8, 8), 1, **options)
    assert (edited.tokens == 3).all()


def test_a_part_of_the_sampler_is_exchanged(tiny):
    values = tiny.transformer.condition.parse([1, 2])
    sampler = build_sampler(tiny.tokenizer, tiny.transformer, values, SampleConfig())
    greedy = sample_images(replace(sampler, draw=lambda logits_BNV, k: logits_BNV.argmax(dim=-1)))
    assert torch.equal(greedy.tokens_BL, tiny.sample([1, 2], top_k=1).tokens)


def test_the_example_of_the_documentation(tiny):
    test = doctest.DocTestFinder().find(nextscale.sampling.filters, globs={"pipeline": tiny, "torch": torch})[0]
    assert len(test.examples) == 3
    assert doctest.DocTestRunner().run(test).failed == 0


# ---- combinations


def request(**changes) -> Request:
    return replace(Request(SampleConfig(), tiny_config().transformer), **changes)


def mixture(residual: bool):
    """MoE++ in three blocks, with or without the gating residual."""
    experts = ExpertsConfig(router="moe++", count=4, active=2, gating_residual=residual)
    return tiny_config(depth=3, experts=experts).transformer


MAMBA = tiny_config(mixers=MVAR_MIXERS, mamba=MambaConfig(state_width=6, head_width=8)).transformer
DENSE = tiny_config().transformer
PRUNE = SampleConfig(prune=(0.5,), prune_first_block=0)
COMBINATIONS = {
    "prune cannot work with mamba": {"settings": PRUNE, "model": MAMBA},
    "prune cannot work with rotary": {"settings": PRUNE, "model": replace(DENSE, positions=PositionConfig("rotary"))},
    "prune cannot work with MoE": {"settings": PRUNE, "model": mixture(residual=True)},
    "draft_scales and prune": {"settings": PRUNE, "refiner": DENSE},
    "draft_scales needs a refiner": {"settings": SampleConfig(draft_scales=1)},
    "official_seeding draws": {"settings": SampleConfig(official_seeding=True), "first_image": 3},
    "captured steps cannot be combined with prune": {"settings": PRUNE, "captured": True},
    "captured steps cannot be combined with a refiner": {
        "settings": SampleConfig(draft_scales=1), "refiner": DENSE, "captured": True,
    },
    "captured steps have fixed shapes": {"settings": SampleConfig(tau=(0.5, 1.0)), "captured": True},
}  # fmt: skip


@pytest.mark.parametrize("reason", COMBINATIONS)
def test_combinations_that_are_refused(reason):
    with pytest.raises(UserError, match=reason):
        check_combinations(request(**COMBINATIONS[reason]))


def test_every_refusal_has_a_test_and_nothing_else_is_refused():
    assert [sum(reason.startswith(name) for name in COMBINATIONS) for _, reason in REFUSED] == [1] * len(REFUSED)
    check_combinations(request(settings=PRUNE, model=mixture(residual=False)))
    check_combinations(request(settings=replace(PRUNE, prune_first_block=3), model=mixture(residual=True)))
    check_combinations(request(settings=SampleConfig(draft_scales=1), refiner=DENSE, first_image=3))
    check_combinations(request(settings=SampleConfig(official_seeding=True, smooth=True), captured=True))
    check_combinations(request(settings=SampleConfig(tau=(1.0, 1.0)), captured=True))


def test_thresholds_of_a_dense_model_are_refused_with_graphs_too(tiny):
    with pytest.raises(UserError, match="divided into experts"):
        tiny.capture().sample([1], tau=(1.0,))


def halves(pipeline):
    """An image of the model's size, and a mask that keeps its left half."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    return pipeline.sample([4], seed=9).pil()[0], mask


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("cfg", [2.0, [0.0, 1.0, 0.5, 2.0]])
def test_edits_with_graphs_refiner_and_pruning(cfg, smooth):
    """An edit with captured steps, with a refiner that is the model, or with nothing pruned is the plain edit."""
    pipeline = randomised(tiny_config())
    image, mask = halves(pipeline)
    options = {"cfg": cfg, "smooth": smooth, "seed": 2}
    plain = pipeline.edit(image, mask, 1, **options)
    pruned = pipeline.edit(image, mask, 1, prune=(0.0, 0.0), prune_first_block=0, **options)
    assert torch.equal(pruned.tokens, plain.tokens)
    kept = pipeline.edit(image, torch.ones(8, 8), 1, prune=(0.5, 0.5), prune_first_block=0, **options)
    assert torch.equal(kept.tensor, pipeline.reconstruct([image]).tensor)
    pipeline.refine_with(pipeline)
    assert torch.equal(pipeline.edit(image, mask, 1, draft_scales=2, **options).tokens, plain.tokens)
    captured = pipeline.capture().edit(image, mask, 1, **options)
    assert torch.equal(captured.tensor, plain.tensor)


@pytest.mark.parametrize("options", [{"draft_scales": 2}, {"prune": (0.0,)}, {"official_seeding": True}, {}])
def test_schedules_with_everything_else(options):
    """Guidance of each scale is the same with a refiner that is the model, with nothing pruned, and with graphs."""
    pipeline = randomised(tiny_config())
    pipeline.refine_with(pipeline)
    official = {"official_seeding": options.get("official_seeding", False)}
    plain = pipeline.sample([1, None], seed=4, **SCHEDULES, **official)
    assert torch.equal(pipeline.sample([1, None], seed=4, **SCHEDULES, **options).tokens, plain.tokens)
    if not options or "official_seeding" in options:
        assert torch.equal(pipeline.capture().sample([1, None], seed=4, **SCHEDULES, **options).tokens, plain.tokens)


# ---- captured steps


def test_interleaved_captured_generators_do_not_share_a_cache():
    pipeline = randomised(tiny_config())
    plain = [list(pipeline.sample_scales([i, 3], seed=i)) for i in range(3)]
    pipeline.capture()
    for _ in range(2):  # the second time on steps that the first gave back
        runs = [pipeline.sample_scales([i, 3], seed=i) for i in range(3)]
        for k in range(K):
            for i, run in enumerate(runs):
                assert torch.equal(next(run).logits_BNV, plain[i][k].logits_BNV), f"image {i}, scale {k}"


def test_captured_steps_are_reused_and_given_back():
    pipeline = randomised(tiny_config()).capture()
    for seed in range(3):
        pipeline.sample([1, 2], seed=seed)
    first = next(pipeline.sample_scales([1, 2]))  # a generator that is dropped half-way
    assert first.k == 0
    pool = pipeline._capturing.pool
    assert [key for key, _ in pool._idle] == [((4,) * 4, None)]
    pipeline.sample([1])
    assert [key for key, _ in pool._idle] == [((4,) * 4, None), ((2,) * 4, None)]


def test_captured_steps_of_a_model_on_the_fast_backend(tiny_folder):
    plain, captured = (Pipeline.from_pretrained(tiny_folder) for _ in range(2))
    for seed in range(2):
        expected = plain.sample([1, 2], seed=seed)
        assert torch.equal(captured.capture().sample([1, 2], seed=seed).tensor, expected.tensor)


def test_captured_steps_follow_the_weights():
    """After a move to another dtype, and after new weights in place."""
    config = tiny_config()
    pipeline, other = randomised(config).capture(), randomised(config, seed=1)
    before = pipeline.sample([1, 2], seed=3)
    pipeline.to("cpu", torch.float64)
    assert pipeline.sample([1, 2], seed=3).tensor.isfinite().all()
    pipeline.to("cpu", torch.float32)
    assert torch.equal(pipeline.sample([1, 2], seed=3).tokens, before.tokens)
    pipeline.transformer.load_state_dict(other.transformer.state_dict())
    pipeline.tokenizer.load_state_dict(other.tokenizer.state_dict())
    assert torch.equal(pipeline.sample([1, 2], seed=3).tokens, other.sample([1, 2], seed=3).tokens)
