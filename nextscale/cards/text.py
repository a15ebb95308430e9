"""The text of a card as Markdown. What is not known is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nextscale.cards.limits import list_limits
from nextscale.cards.model import CardModel
from nextscale.cards.reports import Figures
from nextscale.cards.training import Training
from nextscale.cards.use import write_use
from nextscale.config.profile import explain_profile, list_profiles
from nextscale.config.sampling import SampleConfig
from nextscale.sampling.thresholds import read_budgets

_SHOWN_CLASSES = 20
_SHARES = frozenset(("accuracy", "knn_accuracy", "codes_used", "classifier_read_as_asked", "generated_read_as_asked"))
"""Figures that are shown in percent."""
_LABELS = {
    "fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "psnr_db": "PSNR, dB", "ssim": "SSIM",
    "codes_used": "codes used", "codebook_perplexity": "perplexity of the codes", "accuracy": "accuracy",
    "cross_entropy": "cross-entropy, nats", "knn_accuracy": "k-NN accuracy",
    "classifier_read_as_asked": "assigned to the requested class by the classifier",
    "generated_read_as_asked": "assigned to the requested class by a classifier of real images",
    "reconstruction_psnr_db": "PSNR of reconstructions, dB", "held_out_nats": "held-out images, nats per token",
}  # fmt: skip


@dataclass(frozen=True)
class Content:
    """All that a card says."""

    model: CardModel
    name: str
    """What the model is called in commands: a folder, or owner/name on the hub."""
    training: Training
    figures: Sequence[Figures]
    pictures: Sequence[str]
    """Pictures of samples or reconstructions, relative to the folder."""
    settings: SampleConfig
    """Of the lines that sample."""
    licence: str = ""
    has_own_text: bool = False
    """Whether a person's text follows the card."""

    @property
    def title(self) -> str:
        """The model's own name."""
        return self.name.rstrip("/").rpartition("/")[2]


def write_text(content: Content) -> str:
    """The card without its metadata."""
    parts = [
        f"# {_escape(content.title)}",
        write_summary(content.model),
        *_show_pictures(content),
        *_write_use(content),
    ]
    parts += ["## Model", _tabulate(_describe_model(content.model))]
    rows = _describe_training(content.training)
    if rows:
        parts += ["## Training", _tabulate(rows)]
    if content.training.changed:
        parts.append("The weights were changed, or stored in another type, after this training.")
    if content.figures:
        parts += ["## Figures", *(_show_figures(figures) for figures in content.figures)]
    limits = list_limits(content.model, content.training, content.figures, content.has_own_text)
    parts += ["## Limits", _itemise(limits)]
    return "\n\n".join([*parts, "## Licence", _write_licence(content)])


def write_summary(model: CardModel) -> str:
    """The first sentence: what the model is."""
    size, count = format_pixels(model.size), format_count(model.parameters)
    if model.kind == "classifier":
        return _wrap(
            f"An image classifier of {model.classes} classes at {size}, {count} parameters, made with nextscale. Its "
            "features measure generators of such images (`nextscale evaluate --features`)."
        )
    if model.kind == "encoder":
        how = "trained without labels (MoCo v2)" if model.steps else "that is not trained"
        rows, columns = model.grid
        return _wrap(
            f"An image encoder {how}, made with nextscale: {model.width} channels on {rows} x {columns} cells for "
            f"images of {size}, {count} parameters. It guides generators (`--loss.encoder`) and compares them."
        )
    assert model.config is not None, "a generator or a tokenizer"
    codes, tokens = model.config.tokenizer.vocab_size, model.config.pyramid.length
    if model.config.transformer is None:
        return _wrap(
            f"A multi-scale image tokenizer, made with nextscale: it encodes an image of {size} as {tokens} tokens "
            f"of {codes:,} codes on {len(model.config.pyramid)} token maps, and decodes them; {count} parameters."
        )
    classes = f" of {model.classes:,} class{'es' * (model.classes != 1)}" if model.classes else ""
    return _wrap(
        f"{name_family(model)} that generates images{classes} at {size} by next-scale prediction, from "
        f"{len(model.config.pyramid)} token maps, coarse to fine; {count} parameters. Made with nextscale."
    )


def name_family(model: CardModel) -> str:
    """A VAR or M-VAR model, and its experts."""
    config = model.config.transformer if model.config else None
    assert config is not None, "a generator has a transformer"
    mixers = {name for block in range(config.depth) for name in config.block_mixers(block)}
    name = "An M-VAR model (VAR with Mamba layers)" if "mamba" in mixers else "A VAR model"
    if config.experts.router != "none":
        return f"{name} with mixtures of experts"
    return f"{name} with dynamic experts" if config.dynamic.experts else name


def _show_pictures(content: Content) -> list[str]:
    what = "Samples" if content.model.kind == "generator" else "Images and their reconstructions, scale by scale"
    return [f"![{what}]({name})" for name in content.pictures[:1]]


def _write_use(content: Content) -> list[str]:
    commands, lines = write_use(content.model, content.name, content.settings)
    parts = ["## Use", _block("sh", commands), _block("python", lines)]
    profiles = list_profiles(content.model.folder) if content.model.kind == "generator" else []
    told = {name: explain_profile(content.model.folder, name) for name in profiles}
    told = {name: text for name, text in told.items() if not text.startswith("cannot be used")}
    texts = [f"`--profile {name}`, settings that `nextscale tune` found: {_escape(t)}" for name, t in told.items()]
    return [*parts, _itemise(texts)] if texts else parts


def _describe_model(model: CardModel) -> dict[str, str]:
    rows = {"images": format_pixels(model.size)}
    if model.config is None:
        rows["parameters"] = format_count(model.parameters)
    else:
        rows |= _describe_networks(model)
    if model.classes is not None:
        names = ", ".join(map(_escape, model.class_names[:_SHOWN_CLASSES]))
        more = ", ..." if len(model.class_names) > _SHOWN_CLASSES else ""
        rows["classes"] = f"{model.classes:,}" + (f": {names}{more}" if names else "")
    stored = ", the transformer's linear layers in 8 bits" if model.is_int8 else ""
    size = f"{model.bytes / 1e6:,.1f} MB" if model.bytes >= 1e6 else f"{model.bytes / 1e3:,.1f} kB"
    rows["weights"] = f"{size}{stored}"
    return rows


def _describe_networks(model: CardModel) -> dict[str, str]:
    config = model.config
    assert config is not None, "a generator or a tokenizer"
    sides = ", ".join(f"{h}x{w}" for h, w in config.pyramid.sides)
    rows = {"token maps": f"{sides}: {config.pyramid.length} tokens of {config.tokenizer.vocab_size:,} codes"}
    network = config.transformer
    if network is not None:
        size = f"depth {network.depth}, width {network.width}, {network.heads} heads"
        rows["transformer"] = f"{format_count(model.parameters)} parameters: {size}"
        if network.experts.router != "none":
            experts = network.experts
            active = f"; {format_count(model.active_parameters)} parameters active for a token"
            chosen = f"router {experts.router}, {experts.active} selected"
            rows["experts"] = f"{experts.count} in each block, {chosen}{active}"
        if network.dynamic.experts:
            shares = ", ".join(f"{row.share:.2f}" for row in read_budgets(model.origin))
            table = f"; `--budget` takes shares of the dense FLOPs, calibrated: {shares}" if shares else ""
            scales = network.dynamic.scales
            rows["dynamic experts"] = f"{network.dynamic.experts} in each block at the last {scales} scales{table}"
        if model.own_modules:
            rows["own code"] = f"needs {', '.join(f'`{module}`' for module in model.own_modules)}, which is not here"
    rows["tokenizer"] = f"{format_count(model.tokenizer_parameters)} parameters"
    return rows


def _describe_training(training: Training) -> dict[str, str]:
    """The rows of what is known."""
    t = training
    images = f"{t.images:,} images" if t.images else ""
    views = f"{t.views} views of each" if t.views > 1 else ""
    names = [f"`{name}`" for name in dict.fromkeys([*([t.data] if t.data else []), *t.datasets])]
    data = [*names, images, views, *t.augmentation]
    passes = f"{t.passes:,.1f} passes over the images" if t.images and t.steps else ""
    planned = f"({t.planned_steps:,} planned)" if t.steps < t.planned_steps else ""
    steps = f"{t.steps:,} {planned}".strip() if t.steps else ""
    batch = f"{t.batch_size:,} images in each" if t.batch_size else ""
    held_out = [
        f"{name} {_percent(value)}" if "accuracy" in name else f"{value:.4g} {name}"
        for name, value in t.held_out.items()
    ]
    held_out += [f"after step {t.held_out_step:,}"] if t.held_out_step and held_out else []
    guides = {"own": "an encoder trained on the same images", "cache": "features in the token cache"}
    held_out += [f"class and position frequencies alone: {t.frequencies:.4g}"] if t.frequencies else []
    rows = {
        "command": f"`{t.command}`" if t.command else "",
        "data": _join(data),
        "started from": f"`{t.start}`" if t.start else "",
        "steps": _join([steps, batch, passes]),
        "precision": t.precision,
        "learning rate": f"{t.learning_rate:g}, the largest" if t.learning_rate else "",
        "average of the weights": f"decay {t.ema:g}" if t.ema else "",
        "semantic guidance": guides.get(t.guidance, f"encoder `{t.guidance}`") if t.guidance else "",
        "seed": "" if t.seed is None else str(t.seed),
        "held-out images": _join(held_out) if t.held_out else "",
    }
    return {name: text for name, text in rows.items() if text}


def _show_figures(figures: Figures) -> str:
    rows = {_LABELS.get(name, name): format_figure(name, value) for name, value in figures.values.items()}
    about = f"{figures.about[:1].upper()}{figures.about[1:]} ([{figures.file}]({figures.file}))."
    return f"{_wrap(about)}\n\n{_tabulate(rows, 'figure', 'value')}"


def _write_licence(content: Content) -> str:
    if content.licence:
        return f"{_escape(content.licence)}"
    if content.model.is_official:
        return _wrap("Not stated. The weights were converted from official files, whose authors set their licence.")
    return "Not stated."


def format_figure(name: str, value: float) -> str:
    """A figure with four digits, or in percent."""
    return _percent(value) if name in _SHARES else f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def format_count(count: int) -> str:
    """A number of parameters: 2.87 million."""
    if count >= 1e6:
        return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
    return f"{count:,}"


def format_pixels(size: tuple[int, int]) -> str:
    """Height x width."""
    return f"{size[0]} x {size[1]} pixels"


def _join(parts: Iterable[str]) -> str:
    return ", ".join(filter(None, parts))


def _tabulate(rows: dict[str, str], *head: str) -> str:
    names = f"| {' | '.join(head)} |" if head else "| | |"
    lines = [f"| {name} | {text} |" for name, text in rows.items()]
    return "\n".join([names, "|---|---|", *lines])


def _block(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _itemise(texts: Sequence[str]) -> str:
    """A list; continued lines are indented."""
    return "\n".join("- " + _wrap(text).replace("\n", "\n  ") for text in texts)


def _wrap(text: str, width: int = 116) -> str:
    """Lines of limited length; sizes, code and links are not cut."""
    lines, line = [], ""
    for word in re.findall(r"(?:\d+ x \d+|`[^`]*`|\[[^\]]*\]\([^)]*\)|\S)+", text):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def _escape(text: Any) -> str:
    """A name that is not ours as plain text in Markdown, also in a table."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", flat)
