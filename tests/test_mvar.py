"""M-VAR: the official implementation's numbers, both ways, and every promise that VAR keeps."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nextscale.backends.segments import list_segments
from nextscale.checkpoints.official import export_official, import_official
from nextscale.checkpoints.official_shapes import Hints
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.initialization import InitConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import MVAR_MIXERS, ExpertsConfig, MambaConfig, TransformerConfig
from nextscale.pipeline import Pipeline
from nextscale.sampling import build_sampler
from nextscale.sampling.sampler import sample_scales
from nextscale.transformer.context import block_causal_mask
from nextscale.transformer.initialization import initialize_transformer
from tests.conftest import GOLDEN, randomised, tiny_config
from tests.test_official import assert_same_tensors, close
from tests.test_transformer import reference_forward

SMALL = MambaConfig(state_width=6, head_width=8)
VARIANTS = {
    "M-VAR": {"qk_norm": False},
    "normalised": {"qk_norm": True},
    "half of the blocks global": {"global_blocks": 1},
    "one adaLN": {"shared_adaln": True},
    "mamba alone": {"mixers": ("mamba",)},
    "experts": {"experts": ExpertsConfig(router="stmoe", count=4, active=2)},
    "experts that look back": {"experts": ExpertsConfig(router="moe++", count=3, active=2), "global_blocks": 1},
}


def mvar_config(scales: str = "1,2,3,4", **transformer):
    """`tiny_config` with M-VAR's mixers."""
    return tiny_config(scales, **{"mixers": MVAR_MIXERS, "mamba": SMALL, **transformer})


class Official:
    """A folder of the official implementation's numbers."""

    def __init__(self, name: str):
        self.vae, self.var = GOLDEN / name / "vae.safetensors", GOLDEN / name / "mvar.safetensors"
        self.meta = json.loads((GOLDEN / name / "meta.json").read_text())
        self.io = load_file(GOLDEN / name / "io.safetensors")

    def pipeline(self) -> Pipeline:
        return Pipeline.from_checkpoint(import_official(self.vae, self.var, Hints()))


@pytest.fixture(scope="module", params=["mvar_tiny", "mvar_tiny_l2"])
def official(request) -> Official:
    return Official(request.param)


@torch.no_grad()
def test_logits_and_blocks_are_the_official_ones(official):
    pipeline, io = official.pipeline(), official.io
    model, inputs = pipeline.transformer, pipeline.tokenizer.teacher_inputs(io["in.tokens"])
    close(inputs, io["out.teacher_forcing_input"])
    close(model(io["in.label"], inputs).logits_BNV, io["out.logits"], 2e-4)
    unknown = torch.full_like(io["in.label"], model.condition.num_classes)
    close(model(unknown, inputs).logits_BNV, io["out.logits_uncond"], 2e-4)
    for i in (0, 1):
        close(model(io["in.label"], inputs, hidden_block=i + 1).hidden_BND, io[f"out.block{i}"], 2e-4)
        mamba = model.blocks[i].mixers[1]
        y, _ = mamba.continue_from(mamba.new_state(2, 0), io[f"out.mamba{i}.in"])
        close(y, io[f"out.mamba{i}.out"])
    tokenizer = pipeline.tokenizer
    assert torch.equal(tokenizer.encode(io["in.image"]), io["out.image_tokens"])


def test_samples_are_the_official_ones(official):
    pipeline = official.pipeline()
    for name, given in official.meta["sampling"].items():
        settings = {"cfg": given["cfg"], "top_k": given["top_k"], "top_p": given["top_p"], "official_seeding": True}
        smooth = given.get("more_smooth", False)
        images = pipeline.sample(official.io["in.label"], seed=given.get("g_seed", 0), smooth=smooth, **settings)
        if not smooth:
            assert torch.equal(images.tokens, official.io[f"out.{name}.tokens"]), name
        close(images.tensor, official.io[f"out.{name}.image"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_command_line_brings_a_checkpoint_in_and_back(official, suffix, tmp_path, capsys):
    """Import, sample, export: the official tokens, and every tensor with its name, type and bits."""
    model, files = str(tmp_path / "model"), [str(tmp_path / f"{n}{suffix}") for n in ("vae", "var")]
    main(["import-official", "--vae", str(official.vae), "--var", str(official.var), "--out", model])
    given, label = official.meta["sampling"]["seeded"], official.io["in.label"].tolist()
    settings = ["--cfg", given["cfg"], "--top-k", given["top_k"], "--top-p", given["top_p"], "--seed", given["g_seed"]]
    labels = ",".join(map(str, label))
    saved = tmp_path / "tokens.safetensors"
    out = ["--out", str(tmp_path / "grid.png"), "--tokens-out", str(saved)]
    main(["sample", model, "--labels", labels, "--official-seeding", *map(str, settings), *out])
    assert torch.equal(load_file(saved)["tokens"].long(), official.io["out.seeded.tokens"])
    main(["export-official", model, "--vae", files[0], "--var", files[1]])
    assert_same_tensors(files[0], official.vae)
    assert_same_tensors(files[1], official.var)


def test_a_file_that_is_no_whole_mvar_is_refused(tmp_path):
    official = Official("mvar_tiny_l2")
    tensors = load_file(official.var)
    del tensors["blocks.1.mamba.dt_bias"]
    save_file(tensors, tmp_path / "var.safetensors")
    with pytest.raises(UserError, match="missing tensor 'blocks.1.mamba.dt_bias'"):
        import_official(official.vae, tmp_path / "var.safetensors", Hints())
    tensors = load_file(official.var)
    tensors["blocks.1.attn.patch_nums"] += 1
    save_file(tensors, tmp_path / "var.safetensors")
    with pytest.raises(UserError, match="'blocks.1.attn.patch_nums' does not fit the pyramid"):
        import_official(official.vae, tmp_path / "var.safetensors", Hints())


@pytest.mark.parametrize(
    ("change", "unknown"),
    [
        ({"experts": ExpertsConfig(router="smoe")}, "a mixture of experts"),
        ({"global_blocks": 1}, "mix tokens by attention or scale-attention, mamba"),
        ({"mixers": ("mamba", "scale-attention")}, "mix tokens by mamba, scale-attention"),
        ({"shared_adaln": True, "mamba": MambaConfig()}, "one adaLN"),
        ({}, "Mamba-2 has other sizes"),
    ],
)
def test_what_the_official_format_cannot_hold_is_not_exported(change, unknown, tmp_path):
    pipeline = Pipeline.from_config(mvar_config(**change))
    with pytest.raises(UserError, match=unknown):
        export_official(pipeline.to_checkpoint(), None, tmp_path / "var.safetensors")


@pytest.mark.parametrize("variant", ["M-VAR", "normalised", "half of the blocks global", "one adaLN", "mamba alone"])
@torch.no_grad()
def test_forward_against_the_formula(variant):
    """Seven scales, not all square, three images, attention scales above their ceiling; in float64, token by token."""
    pipeline = randomised(mvar_config("1,2x1,2,3x2,3,3x4,4", **VARIANTS[variant]))
    model = pipeline.transformer
    for block in model.blocks:
        for mixer in block.mixers:
            if getattr(mixer, "log_scale", None) is not None:
                mixer.log_scale += 4.5  # log 100 = 4.6
    x_BLC = torch.randn(3, model.pyramid.length - 1, 4, generator=torch.Generator().manual_seed(0))
    logits = model(torch.tensor([3, 5, 0]), x_BLC).logits_BNV.double().numpy()
    parameters = {n: t.double().numpy() for n, t in model.state_dict().items()}
    for b, label in enumerate((3, 5, 0)):
        expected = reference_forward(parameters, model, label, x_BLC[b].double().numpy())
        np.testing.assert_allclose(logits[b], expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_steps_with_a_carried_state_equal_the_whole(variant):
    """Scale by scale, on the same fixed memory twice; and all scales up to one caught up with in one pass."""
    model = randomised(mvar_config("1,2x1,3,4x3", **VARIANTS[variant])).transformer
    values, (first, *_) = torch.tensor([1, 2, 5]), model.pyramid.counts
    inputs = torch.randn(3, model.pyramid.length - first, 4, generator=torch.Generator().manual_seed(1))
    whole = model(values, inputs).logits_BNV
    conditioning, cache = model.embed_condition(values), model.new_cache(3)
    for _ in range(2):
        for k, (start, end) in enumerate(model.pyramid.spans):
            step = model.step(conditioning, inputs[:, start - 1 : end - 1] if k else None, k, cache).logits_BNV
            assert (step - whole[:, start:end]).abs().max() <= 1e-5 * whole.abs().max(), f"scale {k}"
    start, end = model.pyramid.spans[2]
    cache = model.new_cache(3)
    late = model.prefill(conditioning, inputs[:, : end - 1], 2, cache).logits_BNV
    assert (late - whole[:, start:end]).abs().max() <= 1e-5 * whole.abs().max()
    last = model.step(conditioning, inputs[:, end - 1 :], 3, cache).logits_BNV
    assert (last - whole[:, end:]).abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
def test_a_scale_sees_no_later_one_and_training_is_the_same_function():
    model = randomised(mvar_config()).transformer
    inputs = torch.randn(1, model.pyramid.length - 1, 4)
    before = model.train()(torch.tensor([1]), inputs).logits_BNV
    assert torch.equal(before, model.eval()(torch.tensor([1]), inputs).logits_BNV)
    for k, (_, end) in enumerate(model.pyramid.spans[:-1]):
        changed = inputs.clone()
        changed[:, end - 1 :] += 1  # the inputs of scale k + 1 and later
        after = model(torch.tensor([1]), changed).logits_BNV
        assert torch.equal(after[:, :end], before[:, :end]), f"scale {k}"
        assert not torch.equal(after[:, end:], before[:, end:])


@pytest.mark.parametrize("fast", [True, False])
@torch.no_grad()
def test_attention_within_a_scale_makes_no_mask(fast):
    for config, masks in ((mvar_config(), 0), (mvar_config(mixers=("attention",)), 1)):
        block_causal_mask.cache_clear(), list_segments.cache_clear()
        model = randomised(config, backend="auto" if fast else "plain").transformer
        model(torch.tensor([1]), torch.zeros(1, model.pyramid.length - 1, 4))
        assert block_causal_mask.cache_info().misses == masks


def kept_floats(cache) -> int:
    states = [s for block in cache for s in block if s is not None]
    return sum(t.numel() for s in states for t in vars(s).values())


def test_memory_does_not_grow_with_the_prefix():
    small, large = (randomised(mvar_config(scales)).transformer.new_cache(2) for scales in ("1,2", "1,2,3,4,8,16"))
    inner, channels = 64, 64 + 2 * 6
    assert kept_floats(small) == kept_floats(large) == 2 * 2 * (3 * channels + inner * 6)


@pytest.mark.parametrize(("threads", "width"), [(1, 32), (2, 44)])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(threads, width, threads_set):
    """Bit for bit, packed or not, in both precisions; a width that is no multiple of a vector among them."""
    threads_set(threads)
    pipeline = randomised(mvar_config("1,2,4,8", width=width, mamba=MambaConfig(state_width=6, head_width=4)))
    for dtype in (torch.float32, torch.bfloat16):
        pipeline.to("cpu", dtype)
        for packed in (False, True):
            used = pipeline.optimize() if packed else pipeline
            together = used.sample([3, 1, 4, 1, 0], top_k=8, seed=5)
            assert torch.equal(used.sample([4], top_k=8, seed=5, first_image=2).tensor[0], together.tensor[2])
            parts = used.sample([3, 1, 4, 1, 0], top_k=8, seed=5, batch_size=2)
            assert torch.equal(parts.tensor, together.tensor)


def test_steps_on_fixed_memory_and_by_a_refiner():
    pipeline, other = (randomised(mvar_config("1,2,3,4"), seed) for seed in (0, 1))
    plain = [pipeline.sample([i, 2], seed=i).tokens for i in range(3)]
    other.tokenizer.load_state_dict(pipeline.tokenizer.state_dict())
    values, settings = pipeline.transformer.condition.parse([1, 2]), SampleConfig(seed=4, draft_scales=2)
    sampler = build_sampler(pipeline.tokenizer, pipeline.transformer, values, settings, refiner=other.transformer)
    steps = list(sample_scales(sampler))
    tokens = torch.cat([s.tokens_BN for s in steps], dim=1)
    inputs = pipeline.tokenizer.teacher_inputs(tokens)
    with torch.no_grad():
        both = torch.cat([inputs, inputs])
        logits = other.transformer(other.transformer.condition.add_unconditional(values), both).logits_BNV
    strength = settings.cfg * pipeline.config.pyramid.progress(3)
    last = slice(*pipeline.config.pyramid.spans[3])
    expected = (1 + strength) * logits[:2, last] - strength * logits[2:, last]
    assert (steps[3].logits_BNV - expected).abs().max() <= 1e-4 * expected.abs().max()
    pipeline.capture()
    for i in range(3):
        assert torch.equal(pipeline.sample([i, 2], seed=i).tokens, plain[i])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="prune cannot work with mamba"):
        Pipeline.from_config(mvar_config()).sample([0], prune=(0.5,))
    with pytest.raises(UserError, match="inner width, 36 x 2, must be a multiple of mamba.head_width, 64"):
        TransformerConfig(depth=1, width=36, heads=1, mixers=MVAR_MIXERS)
    with pytest.raises(UserError, match="global_blocks must be 0 or more; got global_blocks=-1"):
        mvar_config(global_blocks=-1)
    with pytest.raises(UserError, match="shared_adaln needs as many mixers in every block"):
        mvar_config(global_blocks=1, shared_adaln=True)
    with pytest.raises(UserError, match="mixers must be 1 to 16 names"):
        mvar_config(mixers=())


def test_initialisation():
    """Mamba's own choice of decays and steps; its last projection is not made smaller with depth, as officially."""
    model = randomised(mvar_config(depth=8, width=256, heads=4, mamba=MambaConfig(head_width=1))).transformer
    initialize_transformer(model, InitConfig(), torch.Generator().manual_seed(0))
    mamba = model.blocks[0].mixers[1]
    decay, dt = mamba.A_log.exp(), torch.nn.functional.softplus(mamba.dt_bias)
    assert decay.min() >= 1
    assert decay.max() <= 16
    assert abs(decay.mean() - 8.5) < 0.8
    assert dt.min() >= 1e-3 * 0.99
    assert dt.max() <= 0.1 * 1.01
    assert abs(dt.log().mean() - np.log([1e-3, 0.1]).mean()) < 0.3
    assert torch.equal(mamba.D, torch.ones(512))
    assert torch.equal(mamba.norm.weight, torch.ones(512))
    spread = (1 / (3 * 256)) ** 0.5
    assert abs(mamba.out_proj.weight.std() / spread - 1) < 0.05
    assert abs(mamba.conv1d.weight.std() / 0.02 - 1) < 0.1
    assert mamba.conv1d.bias.abs().max() == 0
