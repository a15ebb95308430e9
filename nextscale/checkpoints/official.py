"""Official checkpoints of VAR and M-VAR (`vae_*.pth`, `var_d*.pth`, or the same tensors in safetensors), both ways.

One list of rules translates our names into official ones. Its inverse, over the names that the model has, translates
back. Some tensors of official transformers follow from their config (`lvl_1L`, `attn_bias_for_masking`, `zero_k_bias`,
M-VAR's `patch_nums`). Our modules do not have them: they are checked and dropped on import, and computed on export.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.checkpoints import Checkpoint, Shape, build_on_meta, check_floating, check_tensors, list_shapes
from nextscale.checkpoints.official_files import read_tensors, write_tensors
from nextscale.checkpoints.official_shapes import Hints, infer_config, list_fixed_settings, list_needed_options
from nextscale.common.errors import UserError
from nextscale.common.files import find_target
from nextscale.config.condition import OTHERS
from nextscale.config.model import ModelConfig
from nextscale.config.transformer import MVAR_MIXERS, MambaConfig, TransformerConfig
from nextscale.pyramid import Pyramid

USAGE = "quantize.ema_vocab_hit_SV"
_TOKENIZER_ANCHORS = ("quantize.embedding.weight", "quant_conv.weight", "encoder.conv_in.weight")
_TRANSFORMER_ANCHORS = ("word_embed.weight", "class_emb.weight", "pos_1LC")
"""Names by which the tensors are found in a file. Those of the other part come last, for a message about a swap."""

_TOKENIZER_RULES = [
    (r"^(encoder)\.levels\.(\d+)\.", r"\1.down.\2."),
    (r"\.blocks\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^(encoder.*)\.resample\.", r"\1.downsample.conv."),
    (r"^(decoder.*)\.resample\.", r"\1.upsample.conv."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"(attn[_.]\d)\.proj\.", r"\1.proj_out."),
    (r"^quantizer\.codebook\.", "quantize.embedding."),
    (r"^quantizer\.usage_KV$", USAGE),
]
_PHI_NAMES = {
    "list": "quantize.quant_resi.qresi_ls.{}.",
    "single": "quantize.quant_resi.qresi.",
    "per_scale": "quantize.quant_resi.{}.",
}
_TRANSFORMER_RULES = [
    (r"^condition\.embedding\.", "class_emb."),
    (r"^pos_embed$", "pos_1LC"),
    (r"^level_embed\.", "lvl_embed."),
    (r"\.mixers\.0\.qkv\.", ".attn.mat_qkv."),
    (r"\.mixers\.0\.log_scale$", ".attn.scale_mul_1H11"),
    (r"\.mixers\.0\.", ".attn."),
    (r"\.mixers\.1\.", ".mamba."),
    (r"\.adaln\.linear\.", ".ada_lin.1."),
    (r"\.adaln\.offset$", ".ada_gss"),
    (r"^shared_adaln\.", "shared_ada_lin.1."),
    (r"^head_adaln\.", "head_nm.ada_lin.1."),
]


def import_official(vae: Path, var: Path | None, hints: Hints) -> Checkpoint:
    """Read official files, or what training programs made of them (see `read_tensors`); stored dtypes are kept.

    Raises UserError naming the file and tensor when one is missing, extra or misshapen, or when the pyramid can
    neither be read from the tensors nor was given in `hints`.
    """
    vae_tensors = read_tensors(vae, *_TOKENIZER_ANCHORS, *_TRANSFORMER_ANCHORS)
    var_tensors = read_tensors(var, *_TRANSFORMER_ANCHORS, *_TOKENIZER_ANCHORS) if var else {}
    config, phi_layout = infer_config(vae, vae_tensors, var, var_tensors, hints)
    origin: dict[str, Any] = {"format": "official-var", "phi_layout": phi_layout}
    extras: dict[str, Tensor] = {}

    tokenizer, transformer = build_on_meta(config)
    names = {n: translate_tokenizer_name(n, config, phi_layout) for n in tokenizer.state_dict()}
    usage = vae_tensors.get(USAGE)
    fits = usage is not None and usage.ndim == 2 and usage.shape[1] == config.tokenizer.vocab_size
    if usage is not None and fits and len(usage) != len(config.pyramid):
        # A tokenizer used with another number of scales than it was trained with: the official code ignores it, too.
        extras[USAGE] = usage
        vae_tensors[USAGE] = torch.zeros(len(config.pyramid), config.tokenizer.vocab_size)
    ours = translate(vae, vae_tensors, names, list_shapes(tokenizer))
    if transformer is None or config.transformer is None:
        return Checkpoint(config, ours, {}, origin, extras)

    buffers = compute_buffers(config.transformer, config.pyramid)
    origin["buffers"] = _take_buffers(var, var_tensors, buffers, extras)
    names = {n: translate_transformer_name(n) for n in transformer.state_dict()}
    return Checkpoint(config, ours, translate(var, var_tensors, names, list_shapes(transformer)), origin, extras)


def export_official(checkpoint: Checkpoint, vae: Path | None, var: Path | None) -> list[str]:
    """Write official files; the suffix decides the format (.safetensors, or a torch pickle for anything else).

    Returns notes on what the files do not hold: the head of semantic guidance, which only training uses, the names of
    the classes, and settings that cannot be told from tensors. UserError for what has no official form: mixtures of
    experts, dynamic FFNs, other mixers than those of VAR or M-VAR, an M-VAR of one adaLN or of another Mamba-2, layers
    and conditions of your own.
    """
    if vae is not None and var is not None and find_target(vae) == find_target(var):
        raise UserError(f"tokenizer and transformer cannot be written to the same file, {vae}")
    config, origin = checkpoint.config, checkpoint.origin
    default = "single" if config.tokenizer.num_phi == 1 else "list"
    layout = origin.get("phi_layout", default)
    if layout not in _PHI_NAMES:
        raise UserError(
            f"the checkpoint's origin names an unknown phi_layout '{layout}'; known: {', '.join(_PHI_NAMES)}"
        )
    files: dict[Path, dict[str, Tensor]] = {}
    if vae is not None:
        theirs = {translate_tokenizer_name(n, config, layout): t for n, t in checkpoint.tokenizer.items()}
        files[vae] = theirs | {n: t for n, t in checkpoint.extras.items() if n == USAGE}
    if var is not None:
        if config.transformer is None:
            raise UserError(f"cannot write {var}: this checkpoint is a tokenizer alone")
        if unknown := _unknown_officially(config.transformer):
            raise UserError(
                f"cannot write {var}: {unknown}, which the official format does not know; its tokenizer can be "
                "exported by --vae alone"
            )
        ours = {n: t for n, t in checkpoint.transformer.items() if not n.startswith("projector.")}
        theirs = {translate_transformer_name(n): t for n, t in ours.items()}
        if origin.get("buffers", True):
            theirs.update(compute_buffers(config.transformer, config.pyramid))
        files[var] = theirs | {n: t for n, t in checkpoint.extras.items() if n != USAGE}
    write_tensors(files)
    return _list_losses(checkpoint, vae is not None, files.get(var) if var else None)


def _list_losses(checkpoint: Checkpoint, with_tokenizer: bool, var_tensors: dict[str, Tensor] | None) -> list[str]:
    """Notes on what the official files do not say about the checkpoint."""
    notes = list_fixed_settings(checkpoint.config, with_tokenizer, var_tensors is not None)
    head = [name for name in checkpoint.transformer if name.startswith("projector.")]
    if head and var_tensors is not None:
        notes.append(
            f"the head of semantic guidance ({len(head)} tensors, projector.*) is left out: the official format has no "
            "place for it; sampling does not use it"
        )
    names = checkpoint.config.class_names
    if names and var_tensors is not None:
        notes.append(
            f"the names of the {len(names)} classes are left out: write them to a text file, and import it with "
            "--class-names"
        )
    if checkpoint.config.sizes and var_tensors is not None:
        others = " and ".join(map(str, checkpoint.config.sizes))
        notes.append(f"the other scales that it was trained at are left out: {others}")
    options = list_needed_options(checkpoint.config, with_tokenizer, var_tensors)
    if options:
        notes.append(f"the files do not say {' '.join(options)}: give it to `nextscale import-official`")
    return notes


def _unknown_officially(model: TransformerConfig) -> str:
    """What this model has that neither official code knows; empty when there is nothing."""
    if model.experts.router != "none":
        return f"this model is a mixture of experts ({model.experts.router})"
    if model.dynamic.on:
        return "this model has dynamic FFNs (the model that it was made of may be exported)"
    if model.positions.kind != "table" or model.positions.size_embedding:
        return "this model has rotary positions" if model.positions.kind != "table" else "this model embeds sizes"
    if model.condition.kind in OTHERS:
        return f"this model's images are conditioned on {model.condition.describe()}"
    if model.condition.kind != "class" or model.resolved_feed_forward != "dense":
        own = model.condition.kind if model.condition.kind != "class" else model.resolved_feed_forward
        return f"this model has a layer or condition of your own ({own})"
    kinds = {model.block_mixers(i) for i in range(model.depth)}
    if kinds == {("attention",)}:
        return ""
    if kinds != {MVAR_MIXERS}:
        return f"this model's blocks mix tokens by {' or '.join(', '.join(kind) for kind in sorted(kinds))}"
    if model.mamba != MambaConfig():
        return f"this model's Mamba-2 has other sizes ({model.mamba})"
    return "this M-VAR has one adaLN for all blocks (shared_adaln)" if model.shared_adaln else ""


def translate_tokenizer_name(name: str, config: ModelConfig, phi_layout: str) -> str:
    """The official name of one of our tokenizer's tensors."""
    if match := re.match(r"quantizer\.phi\.(\d+)\.(.*)", name):
        return _PHI_NAMES[phi_layout].format(match[1]) + match[2]
    if match := re.match(r"decoder\.levels\.(\d+)\.(.*)", name):  # theirs counts from full resolution down
        level = len(config.tokenizer.channel_multipliers) - 1 - int(match[1])
        name = f"decoder.up.{level}.{match[2]}"
    return _rewrite(name, _TOKENIZER_RULES)


def translate_transformer_name(name: str) -> str:
    """The official name of one of our transformer's tensors."""
    return _rewrite(name, _TRANSFORMER_RULES)


def translate(
    source: Path | None, theirs: dict[str, Tensor], names: dict[str, str], expected: dict[str, Shape]
) -> dict[str, Tensor]:
    """Official tensors under our names, after checking that they are exactly the ones the model needs."""
    found = {n: tuple(t.shape) for n, t in theirs.items()}
    check_tensors(source, found, {names[n]: shape for n, shape in expected.items()})
    check_floating(source, theirs)
    return {ours: theirs[official] for ours, official in names.items()}


def compute_buffers(config: TransformerConfig, pyramid: Pyramid) -> dict[str, Tensor]:
    """The buffers of the official transformer that follow from its config."""
    scale_L = torch.tensor(pyramid.scale_of_L)
    visible = scale_L[:, None] >= scale_L[None, :]
    each = {"zero_k_bias": torch.zeros(config.width)}
    if config.block_mixers(0) == MVAR_MIXERS:
        visible = scale_L[:, None] == scale_L[None, :]
        each["patch_nums"] = torch.tensor(pyramid.counts, dtype=torch.int32)
    bias = torch.where(visible, 0.0, -torch.inf)
    in_blocks = {f"blocks.{i}.attn.{name}": value for i in range(config.depth) for name, value in each.items()}
    return {"lvl_1L": scale_L[None], "attn_bias_for_masking": bias[None, None], **in_blocks}


def _take_buffers(
    source: Path | None, theirs: dict[str, Tensor], buffers: dict[str, Tensor], extras: dict[str, Tensor]
) -> bool:
    """Take the derived buffers out of `theirs`; those stored in another dtype go to `extras`. False if there are none.

    All or none: a file with some of them has lost tensors. One with other values belongs to another pyramid.
    """
    if not any(name in theirs for name in buffers):
        return False
    for name, derived in buffers.items():
        check_tensors(source, {n: tuple(theirs[n].shape) for n in [name] if n in theirs}, {name: tuple(derived.shape)})
        stored = theirs.pop(name)
        if not torch.equal(stored, derived.to(stored.dtype)):
            raise UserError(f"{source}: '{name}' does not fit the pyramid; check --scales")
        if stored.dtype != derived.dtype:
            extras[name] = stored
    return True


def _rewrite(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
