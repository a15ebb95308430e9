"""What a model costs: parameters, and per scale its FLOPs and memory.

The transformer's arithmetic is counted by its structure; 1 multiply-add = 2 FLOPs, element-wise work is left out, as is
usual. tests/test_info.py compares it with torch's FlopCounterMode. The tokenizer's is counted by that counter itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nextscale.checkpoints import build_on_meta
from nextscale.checkpoints.lora import describe_adapter, is_adapter
from nextscale.checkpoints.native import read_config
from nextscale.checkpoints.quantise import describe_weights
from nextscale.common.errors import UserError
from nextscale.common.registry import CONDITIONS, FEED_FORWARDS, MIXERS
from nextscale.config.model import ModelConfig
from nextscale.config.parse import suggest_name
from nextscale.config.presets import PRESETS, preset
from nextscale.config.profile import explain_profile, list_profiles
from nextscale.config.sampling import SampleConfig, count_scales
from nextscale.config.transformer import TransformerConfig
from nextscale.pyramid import Pyramid
from nextscale.sampling.guidance import count_sequences, schedule_parts
from nextscale.sampling.pruning import PruningPlan
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.positions import SizeEmbedding

_KNOWN_ROUTERS = ("none", "stmoe", "smoe", "expert-choice")
"""Routers that select the same number of experts whatever the tokens are."""


def count_cached_tokens(pyramid: Pyramid, k: int) -> int:
    """Tokens in the cache after scale k; the last scale is not kept."""
    return min(pyramid.spans[k][1], pyramid.spans[-1][0])


def describe(name: str) -> dict[str, Any]:
    """The facts of a preset or a checkpoint folder, as plain JSON values.

    `parameters` counts the transformer (the tokenizer when it stands alone); buffers are no parameters. Per scale:
    tokens, FLOPs of one image without guidance (guidance doubles them), and bytes of what is kept for later scales
    (keys and values, Mamba's states) in float32. `profiles`: those in the folder, in words.
    """
    if name in PRESETS:
        config = preset(name)
    elif is_adapter(Path(name)):
        return describe_adapter(Path(name))
    elif Path(name).is_dir():
        folder, (config, _) = Path(name), read_config(Path(name))
        profiles = {profile: explain_profile(folder, profile) for profile in list_profiles(folder)}
        return describe_config(name, config) | describe_weights(folder) | {"profiles": profiles}
    else:
        raise UserError(f"'{name}' is neither a checkpoint folder nor a model{suggest_name(name, list(PRESETS))}")
    return describe_config(name, config)


def describe_config(name: str, config: ModelConfig) -> dict[str, Any]:
    """The facts of a model under this name, see `describe`."""
    tokenizer, transformer = build_on_meta(config)
    pyramid = config.pyramid
    counts = {
        "tokenizer": count_parameters(tokenizer),
        "transformer": count_parameters(transformer) if transformer else 0,
    }
    encode, decode = _tokenizer_flops(tokenizer, config)
    facts: dict[str, Any] = {
        "name": name,
        "parameters": counts["transformer"] or counts["tokenizer"],
        "transformer_parameters": counts["transformer"],
        "active_parameters": count_active_parameters(config, counts["transformer"]),
        "tokenizer_parameters": counts["tokenizer"],
        "image_size": list(config.image_size),
        "scales": str(pyramid),
        "sizes": [str(other) for other in config.sizes],
        "tokens": pyramid.length,
        "class_names": list(config.class_names),
        "tokenizer_flops": {"encode": encode, "decode": decode},
    }
    if config.transformer is not None:
        facts["classes"] = config.transformer.condition.count_of_classes
        facts["condition"] = config.transformer.condition.describe()
        facts["flops_are"] = describe_flops(config.transformer)
        facts["flops_once_per_image"] = condition_flops(config.transformer)
        facts["per_scale"] = [
            {
                "side": list(side),
                "tokens": pyramid.counts[k],
                "flops": scale_flops(config, k),
                "cache_bytes": count_state_bytes(config, k),
            }
            for k, side in enumerate(pyramid.sides)
        ]
        facts["transformer_flops"] = facts["flops_once_per_image"] + sum(s["flops"] for s in facts["per_scale"])
    facts["weight_bytes_float32"] = 4 * sum(counts.values())
    return facts


def depends_on_tokens(model: TransformerConfig) -> bool:
    """Whether FLOPs depend on the tokens that are drawn, so that only the records of sampling know them."""
    return model.dynamic.experts > 0 or model.experts.router not in _KNOWN_ROUTERS


def describe_flops(model: TransformerConfig) -> str:
    """How the counts of this page relate to what is executed; empty where they are equal."""
    if model.dynamic.experts:
        return "with all experts"
    return "at most" if depends_on_tokens(model) else ""


def count_active_parameters(config: ModelConfig, total: int) -> int:
    """Of the transformer's `total` parameters those that work on a token: m of M experts (MEPA, Table 2)."""
    model = config.transformer
    if model is None:
        return total
    feed_forward: Any = FEED_FORWARDS.get(model.resolved_feed_forward)
    return total - model.depth * int(feed_forward.count_inactive_parameters(model))


def count_state_bytes(config: ModelConfig, k: int) -> int:
    """Bytes that sampling keeps after scale k for the scales to come, one sequence, float32: keys and values of
    attention to all scales, which grow with the scales, and Mamba's window and sums, which do not."""
    model = config.transformer
    assert model is not None, "a tokenizer alone keeps nothing"
    cached = count_cached_tokens(config.pyramid, k)
    mixers: list[Any] = [MIXERS.get(name) for block in range(model.depth) for name in model.block_mixers(block)]
    return 4 * sum(mixer.count_state_values(model, cached) for mixer in mixers)


def scale_flops(config: ModelConfig, k: int, pruning: PruningPlan | None = None, head: bool = True) -> int:
    """FLOPs of the transformer at scale k, one sequence: embedding, projections, attention, feed-forward, head."""
    model = config.transformer
    assert model is not None, "a tokenizer alone has no transformer to count"
    N, D = config.pyramid.counts[k], model.width
    feed_forward: Any = FEED_FORWARDS.get(model.resolved_feed_forward)
    total = N * config.tokenizer.code_width * D if k else 0
    for block in range(model.depth):
        computed = pruning.computed[k] if pruning and pruning.applies(k, block) else N
        seen = (pruning.span(k, block) if pruning else config.pyramid.spans[k])[1]
        mixers: list[Any] = [MIXERS.get(name) for name in model.block_mixers(block)]
        total += sum(mixer.count_multiply_adds(model, computed, seen) for mixer in mixers)
        total += feed_forward.count_multiply_adds(model, len(config.pyramid), computed, block)
    return 2 * (total + N * D * config.tokenizer.vocab_size * head)


def sample_flops(config: ModelConfig, settings: SampleConfig, refiner: ModelConfig | None = None) -> int:
    """FLOPs of the transformer, or of both with a refiner, to sample an image: guidance doubles those of its scales."""
    pruning = PruningPlan(config.pyramid, settings.prune, settings.prune_first_block) if settings.prune else None
    sequences_K = count_sequences(*schedule_parts(settings, config.pyramid))
    assert config.transformer is not None, "a tokenizer alone has no transformer to count"
    total, switch = sequences_K[0] * condition_flops(config.transformer), len(config.pyramid)
    if refiner is not None:  # it takes in at once all that was drawn before
        assert refiner.transformer is not None, "a refiner is a transformer"
        switch = settings.draft_scales
        taken_in = sum(scale_flops(refiner, k, head=False) for k in range(switch))
        total += sequences_K[switch] * (condition_flops(refiner.transformer) + taken_in)
    for k, sequences in enumerate(sequences_K[: count_scales(settings, len(sequences_K))]):
        total += sequences * scale_flops(config if k < switch or refiner is None else refiner, k, pruning)
    return total


def condition_flops(model: TransformerConfig) -> int:
    """FLOPs that the condition costs once per image: its own, of adaLN, and of keys and values of its sequence."""
    names = [model.block_mixers(block) for block in range(model.depth)]
    vectors = [3 * (len(mixers) + 1) for mixers in names]  # FFN's beside the mixers'
    adaln = model.width * model.width * (sum(vectors[:1] if model.shared_adaln else vectors) + 2)
    condition: Any = CONDITIONS.get(model.condition.kind)
    read = sum(int(MIXERS.get(name).count_condition_multiply_adds(model)) for mixers in names for name in mixers)
    size = SizeEmbedding.features * model.width if model.positions.size_embedding else 0
    return 2 * (size + adaln + read + int(condition.count_multiply_adds(model.condition, model.width)))


def count_parameters(module: torch.nn.Module) -> int:
    """The number of a module's parameters; buffers are none."""
    return sum(p.numel() for p in module.parameters())


def _tokenizer_flops(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, int]:
    """FLOPs of encoder and decoder for one image, with the convolutions beside the quantiser."""
    image = torch.empty(1, 3, *config.image_size, device="meta")
    canvas = torch.empty(1, config.tokenizer.code_width, *config.pyramid.last, device="meta")
    totals = []
    for run in (lambda: tokenizer.extract_features(image), lambda: tokenizer.decode_features(canvas)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        totals.append(counter.get_total_flops())
    return totals[0], totals[1]


def as_text(facts: dict[str, Any]) -> str:
    """The facts as a table for people."""
    if "adapter" in facts:
        new = f"\n  new classes          {', '.join(facts['classes'])}" if facts["classes"] else ""
        return (
            f"{facts['name']}: {facts['parameters']:,} parameters\n  adapters             {facts['adapter']}\n"
            f"  of the model         {facts['base'].get('where')}, fingerprint {facts['base']['fingerprint']}{new}"
        )
    experts = facts["active_parameters"] < facts["transformer_parameters"]
    active = f", {facts['active_parameters']:,} of them active" if experts else ""
    lines = [
        f"{facts['name']}: {facts['parameters']:,} parameters{active}",
        f"  tokenizer            {facts['tokenizer_parameters']:,} parameters; "
        f"{_flop(facts['tokenizer_flops']['encode'])} to encode, "
        f"{_flop(facts['tokenizer_flops']['decode'])} to decode an image",
        f"  image                {facts['image_size'][0]} x {facts['image_size'][1]} pixels, {facts['tokens']} tokens",
        f"  weights in float32   {facts['weight_bytes_float32'] / 2**20:,.0f} MiB",
    ]
    if facts["sizes"]:
        lines.append(f"  also trained at      scales {' and '.join(facts['sizes'])}")
    if "weights" in facts:
        size = f"{facts['weight_bytes'] / 2**20:,.0f} MiB"
        lines.append(f"  weights as stored    {size}, linear layers of the transformer in {facts['weights']}")
    if "per_scale" in facts:
        lines.append(f"  condition            {facts['condition']}")
        how = f"{facts['flops_are']} " if facts["flops_are"] else ""
        lines.append(f"  transformer          {how}{_flop(facts['transformer_flops'])} per image, twice with guidance")
        lines.append("\n  scale      tokens        arithmetic   kept for later, float32")
        for scale in facts["per_scale"]:
            h, w = scale["side"]
            side = f"{h}x{w}"
            lines.append(
                f"  {side:<8}{scale['tokens']:>9}{_flop(scale['flops']):>18}{scale['cache_bytes'] / 2**20:>14.2f} MiB"
            )
    lines += [f"\n  profile {name}: {text}" for name, text in facts.get("profiles", {}).items()]
    return "\n".join(lines)


def _flop(count: int) -> str:
    return f"{count / 1e9:,.1f} GFLOP" if count >= 1e9 else f"{count / 1e6:,.1f} MFLOP"
