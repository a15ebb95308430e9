"""The tab Inside: what the model makes of a given picture, scale by scale, and which experts worked."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from nextscale.demo.html import Cell, colour_map, draw_legend, draw_note, draw_table
from nextscale.demo.inside import InsideView, look_inside
from nextscale.demo.models import Model
from nextscale.demo.tabs.controls import (
    NO_LABEL,
    AskedFields,
    Refresh,
    Shared,
    read_one,
    tell_errors,
)
from nextscale.demo.tabs.pictures import PictureChoice

_HEADS = (
    "scale", "up to it", "what it adds", "tokens", "entropy", "right", "PSNR (dB)", "entropy (nats)", "accuracy",
    "probability",
)  # fmt: skip
_HELP = """The picture is encoded into tokens. The model then predicts each scale from the true scales before it
(teacher forcing), so mistakes do not add up."""
_COLUMNS = """*Up to it*: the reconstruction from this and the coarser scales. *What it adds*: half the change, around
grey. *Tokens*: one colour for each code. *Entropy*: how open the prediction is, dark = certain. *Right*: light where
the likeliest code is the picture's. *Probability*: of the picture's codes, geometric mean."""


def build(shared: Shared) -> tuple[list[Any], Refresh]:
    """Lay out the tab; its components that depend on the model, and their values for another one."""
    gr.Markdown(_HELP)
    with gr.Row():
        with gr.Column(min_width=300):
            choice = PictureChoice(shared, "inside")
        with gr.Column(min_width=300):
            asked = AskedFields(shared.model, several=False, start=NO_LABEL, info="What the model is told to be in it.")
    scales = gr.HTML(elem_id="inside-scales")
    gr.Markdown(_COLUMNS)
    block = gr.Slider(
        1, _count_blocks(shared.model), value=_choose_block(shared.model), step=1, label="Block",
        info="Whose experts are shown.", visible=_is_mixture(shared.model),
    )  # fmt: skip
    experts = gr.HTML(_explain_experts(shared.model), elem_id="inside-experts")
    view = gr.State(None)

    def show(source: str, picture: Image.Image, label: int, text: str, block: float) -> tuple[Any, ...]:
        model = shared.models.load(source)
        found = shared.models.run(lambda: look_inside(model, picture, read_one(model, label, text)))
        return found, draw_scales(found, model.config.tokenizer.vocab_size), _draw_block(found, block, model)

    def show_again(source: str, picture: Image.Image | None, label: int, text: str, block: float) -> tuple[Any, ...]:
        return show(source, picture, label, text, block) if picture is not None else (gr.skip(),) * 3

    def show_block(source: str, found: InsideView | None, block: float) -> Any:
        return gr.skip() if found is None else _draw_block(found, block, shared.models.load(source))

    outputs = [view, scales, experts]
    choice.bind(show, asked, [block], outputs)
    told = [shared.source, choice.picture, *asked.components, block]
    for event in (asked.classes.input, asked.texts.submit):
        event(tell_errors(show_again), told, outputs, concurrency_id="model", api_visibility="private")
    block.input(
        tell_errors(show_block), [shared.source, view, block], [experts], show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip

    def refresh(model: Model) -> list[Any]:
        return [
            *asked.refresh(model),
            gr.update(maximum=_count_blocks(model), value=_choose_block(model), visible=_is_mixture(model)),
            _explain_experts(model), "", None, None,
        ]  # fmt: skip

    return [*asked.components, block, experts, scales, view, choice.picture], refresh


def draw_scales(view: InsideView, codes: int) -> str:
    """The table of the scales. `codes`: the size of the codebook, whose uniform use has the largest entropy."""
    highest = max(max(map(max, scale.entropy)) for scale in view.scales)
    rows: list[tuple[str, list[Cell | str]]] = []
    for scale in view.scales:
        rows.append(
            (
                scale.name,
                [
                    Cell(scale.picture, f"the picture up to scale {scale.name}"),
                    Cell(scale.added, f"what scale {scale.name} adds"),
                    Cell(colour_map(scale.tokens), f"tokens of scale {scale.name}"),
                    Cell(colour_map(scale.entropy, highest), f"entropy at each position of scale {scale.name}"),
                    Cell(colour_map(scale.right), f"where the likeliest code of scale {scale.name} is right"),
                    f"{scale.psnr:.1f}", f"{scale.mean_entropy:.2f}", f"{scale.accuracy:.0%}",
                    f"{scale.probability:.2%}",
                ],
            )
        )  # fmt: skip
    return draw_table(_HEADS, rows, f"The picture in {len(rows)} scales; {codes:,} codes")


def draw_experts(view: InsideView, block: int) -> str:
    """The table of a mixture's experts in a block, counted from 0: maps, and each one's share of the work."""
    *load, total = view.compute_load(block)
    rows: list[tuple[str, list[Cell | str]]] = []
    for scale, maps, shares in zip(view.scales, view.routing[block], load, strict=True):
        cells: list[Cell | str] = [
            Cell(colour_map(values), f"{name}: {share:.0%} of the work at scale {scale.name}", f"{share:.0%}")
            for name, values, share in zip(view.experts, maps, shares, strict=True)
        ]
        rows.append((scale.name, cells))
    rows.append(("all", [f"{share:.0%}" for share in total]))
    title = f"Where each expert of block {block + 1} worked, and its share of the scale's work"
    return draw_table(["scale", *view.experts], rows, title) + draw_legend("did not work", "worked")


def _draw_block(view: InsideView, block: float, model: Model) -> str:
    if not view.routing:
        return _explain_experts(model)
    return draw_experts(view, min(int(block), len(view.routing)) - 1)


def _explain_experts(model: Model) -> str:
    """What the page says of the experts before a picture is chosen, and of a model without a mixture."""
    if _is_mixture(model):
        return draw_note("Choose a picture to see which experts work where.")
    if model.pipeline.transformer.config.dynamic.experts:
        return draw_note("This model is no mixture of experts. The tab Compute shows where its dynamic experts work.")
    return draw_note("This model is no mixture of experts: every position passes through the same layers.")


def _is_mixture(model: Model) -> bool:
    return model.pipeline.transformer.config.experts.router != "none"


def _count_blocks(model: Model) -> int:
    return model.pipeline.transformer.config.depth


def _choose_block(model: Model) -> int:
    """The last but one, as in the figures of MEPA."""
    return max(_count_blocks(model) - 1, 1)
