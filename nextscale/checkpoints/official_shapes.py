"""Infer a model's config from the names and shapes of the tensors of an official checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.model import ModelConfig
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import MVAR_MIXERS, TransformerConfig
from nextscale.pyramid import PYRAMID_256, PYRAMID_512, PYRAMID_1024, Pyramid


@dataclass(frozen=True)
class Hints:
    """Settings that cannot be inferred from the tensors of an official checkpoint."""

    pyramid: Pyramid | None = None
    """Needed when maps are not square or the file has no `lvl_1L`."""
    heads: int | None = None
    """Needed without q/k normalisation when heads are not 64 wide."""
    phi_ratio: float = 0.5
    cosine_lookup: bool = False
    class_names: tuple[str, ...] = ()


def infer_config(
    vae: Path, vae_tensors: dict[str, Tensor], var: Path | None, var_tensors: dict[str, Tensor], hints: Hints
) -> tuple[ModelConfig, str]:
    """Config of a pair of official files, and how `vae` names phi convolutions: list, single or per_scale."""
    _refuse_swapped(vae, vae_tensors, var, var_tensors)
    tokenizer, layout = _infer_tokenizer(vae, vae_tensors, hints)
    if var is None:
        rows = len(_get_tensor(vae, vae_tensors, "quantize.ema_vocab_hit_SV"))
        pyramid = hints.pyramid or (PYRAMID_256 if rows == len(PYRAMID_256) else None)
        if pyramid is None:
            raise UserError(f"{vae} does not say its token map sides; give them with --scales, coarse to fine")
        return ModelConfig(pyramid, tokenizer, None, hints.class_names), layout
    transformer = _infer_transformer(var, var_tensors, hints)
    book, head = (
        tuple(vae_tensors["quantize.embedding.weight"].shape),
        _get_tensor(var, var_tensors, "head.weight").shape[0],
    )
    width = var_tensors["word_embed.weight"].shape[1]
    if book != (head, width):
        raise UserError(
            f"{vae} has {book[0]} codes of width {book[1]}, but {var} predicts {head} codes of width {width}: "
            "they belong to different models"
        )
    return ModelConfig(
        _infer_pyramid(var, var_tensors, hints.pyramid), tokenizer, transformer, hints.class_names
    ), layout


def list_needed_options(config: ModelConfig, with_tokenizer: bool, var_tensors: dict[str, Tensor] | None) -> list[str]:
    """The options of `nextscale import-official` without which official files would give another config.

    `with_tokenizer`: the files are a tokenizer's, and a transformer's where there are `var_tensors`.
    """
    options, hints, where = [], Hints(), Path("the file")
    if with_tokenizer and config.tokenizer.num_phi and config.tokenizer.phi_ratio != hints.phi_ratio:
        options.append(f"--phi-ratio {config.tokenizer.phi_ratio}")
    if with_tokenizer and config.tokenizer.cosine_lookup:
        options.append("--cosine-lookup")
    pyramid: Pyramid | None = PYRAMID_256 if len(config.pyramid) == len(PYRAMID_256) else None
    if var_tensors is not None and config.transformer is not None:
        try:
            heads = _infer_transformer(where, var_tensors, hints).heads
        except UserError:
            heads = 0
        if heads != config.transformer.heads:
            options.append(f"--heads {config.transformer.heads}")
        try:
            pyramid = _infer_pyramid(where, var_tensors, None)
        except UserError:
            pyramid = None
    if pyramid != config.pyramid:
        options.append(f"--scales {config.pyramid}")
    return options


def list_fixed_settings(config: ModelConfig, with_tokenizer: bool, with_transformer: bool) -> list[str]:
    """Settings that the official code fixes, where the model's differ: no official file can say them."""
    tokenizer, transformer = config.tokenizer, config.transformer
    fixed: list[tuple[str, Any, Any]] = []
    if with_tokenizer:
        fixed.append(("tokenizer.norm_groups", tokenizer.norm_groups, TokenizerConfig.norm_groups))
        fixed.append(("tokenizer.commitment", tokenizer.commitment, TokenizerConfig.commitment))
    if with_transformer and transformer is not None:
        fixed.append(("transformer.norm_eps", transformer.norm_eps, TransformerConfig.norm_eps))
    return [
        f"{name} is {value}, the official code's {official}" for name, value, official in fixed if value != official
    ]


def _infer_tokenizer(source: Path, tensors: dict[str, Tensor], hints: Hints) -> tuple[TokenizerConfig, str]:
    vocab_size, code_width = _get_tensor(source, tensors, "quantize.embedding.weight").shape
    base = _get_tensor(source, tensors, "encoder.conv_in.weight", 4).shape[0]
    levels = _count_layers(source, tensors, r"encoder\.down\.(\d+)\.")
    widths = [_get_tensor(source, tensors, f"encoder.down.{i}.block.0.conv1.weight", 4).shape[0] for i in range(levels)]
    num_phi, layout = _infer_phi(tensors)
    config = TokenizerConfig(
        vocab_size=vocab_size,
        code_width=code_width,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        res_blocks=_count_layers(source, tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        attention=any(re.match(r"encoder\.down\.\d+\.attn\.", name) for name in tensors),
        middle_attention=any(name.startswith("encoder.mid.attn_1.") for name in tensors),
        quant_conv_kernel=_get_tensor(source, tensors, "quant_conv.weight", 4).shape[-1],
        num_phi=num_phi,
        phi_ratio=hints.phi_ratio if num_phi else 0.0,
        cosine_lookup=hints.cosine_lookup,
    )
    return config, layout


def _infer_phi(tensors: dict[str, Tensor]) -> tuple[int, str]:
    for layout, pattern in (("list", r"qresi_ls\.(\d+)"), ("single", r"qresi\."), ("per_scale", r"(\d+)")):
        found = {name for name in tensors if re.match(rf"quantize\.quant_resi\.{pattern}.*weight$", name)}
        if found:
            return len(found), layout
    return 0, "list"


def _infer_transformer(source: Path, tensors: dict[str, Tensor], hints: Hints) -> TransformerConfig:
    width = _get_tensor(source, tensors, "word_embed.weight").shape[0]
    scale = next((t for name, t in tensors.items() if name.endswith(".attn.scale_mul_1H11")), None)
    depth = _count_layers(source, tensors, r"blocks\.(\d+)\.")
    published = depth if width % 64 else width // 64  # heads are 64 wide in every published model
    heads = hints.heads or (scale.numel() if scale is not None else published)
    if heads < 1 or width % heads:
        raise UserError(f"{source}: cannot tell the number of attention heads of width {width}; give it with --heads")
    return TransformerConfig(
        depth=depth,
        width=width,
        heads=heads,
        ffn_ratio=_get_tensor(source, tensors, "blocks.0.ffn.fc1.weight").shape[0] / width,
        qk_norm=scale is not None,
        shared_adaln=any(name.startswith("shared_ada_lin.") for name in tensors),
        mixers=MVAR_MIXERS if any(".mamba." in name for name in tensors) else ("attention",),
        condition=ConditionConfig(num_classes=_get_tensor(source, tensors, "class_emb.weight").shape[0] - 1),
    )


def _infer_pyramid(source: Path, tensors: dict[str, Tensor], given: Pyramid | None) -> Pyramid:
    """The given pyramid, or the one that `lvl_1L` holds. UserError when it does not fit the embeddings."""
    length, scales = (
        _get_tensor(source, tensors, "pos_1LC", 3).shape[1],
        len(_get_tensor(source, tensors, "lvl_embed.weight")),
    )
    first = _get_tensor(source, tensors, "pos_start", 3).shape[1]
    levels = tensors.get("lvl_1L")
    pyramid = given
    if pyramid is None and levels is not None:
        pyramid = Pyramid.from_counts(levels.flatten().long().clamp(0, scales).bincount().tolist())
    if pyramid is None and levels is None:
        known = (PYRAMID_256, PYRAMID_512, PYRAMID_1024)
        pyramid = next((p for p in known if (p.length, len(p)) == (length, scales)), None)
    if pyramid is None:
        raise UserError(
            f"{source} does not say its token map sides ({scales} scales, {length} tokens); "
            "give them with --scales, coarse to fine, as in 1,2,3,4 or 1x1,2x3,4x6"
        )
    if (pyramid.length, len(pyramid), pyramid.counts[0]) != (length, scales, first):
        raise UserError(
            f"{source} has {scales} scales, {length} tokens and {first} at the first scale, but the pyramid {pyramid} "
            f"has {len(pyramid)}, {pyramid.length} and {pyramid.counts[0]}; check --scales"
        )
    return pyramid


def _refuse_swapped(
    vae: Path, vae_tensors: dict[str, Tensor], var: Path | None, var_tensors: dict[str, Tensor]
) -> None:
    if "word_embed.weight" in vae_tensors and "quantize.embedding.weight" not in vae_tensors:
        raise UserError(f"{vae} is a transformer, not a tokenizer; pass it with --var")
    if var is not None and "quantize.embedding.weight" in var_tensors and "word_embed.weight" not in var_tensors:
        raise UserError(f"{var} is a tokenizer, not a transformer; pass it with --vae")


def _get_tensor(source: Path, tensors: dict[str, Tensor], name: str, ndim: int = 2) -> Tensor:
    if name not in tensors:
        raise UserError(f"{source} is missing tensor '{name}'; it is not a whole official checkpoint")
    tensor = tensors[name]
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise UserError(f"{source}: misshapen tensor '{name}': {tuple(tensor.shape)}, it must have {ndim} dimensions")
    return tensor


def _count_layers(source: Path, tensors: dict[str, Tensor], pattern: str) -> int:
    found = [int(m[1]) for name in tensors if (m := re.match(pattern, name))]
    if not found:
        raise UserError(f"{source} has no tensor named like {pattern}; it is not an official checkpoint")
    return max(found) + 1
