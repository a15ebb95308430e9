"""The tab Edit: repaint a part of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.demo.editing import AREAS, DRAWN, build_mask, enlarge, fit_image, repaint
from nextscale.demo.models import Model, Models
from nextscale.demo.tabs.controls import (
    AskedFields,
    Refresh,
    Settings,
    Shared,
    StopButton,
    choose_seed,
    fill_gallery,
    read_one,
    show_gallery,
)
from nextscale.demo.tabs.pictures import PictureChoice

_HELP = """Choose a picture, mark what to repaint, choose a class or write a text, then Repaint. The rest stays, up to
what the tokenizer changes when it encodes and decodes a picture."""
_BRUSH = "#e6007e"
"""A colour that few pictures have."""


def build(shared: Shared) -> tuple[list[Any], Refresh]:
    """Lay out the tab; its components that depend on the model, and their values for another one."""
    gr.Markdown(_HELP)
    with gr.Row():
        with gr.Column(min_width=300):
            choice = PictureChoice(shared, "edit")
            editor = gr.ImageEditor(
                label="Picture to draw on", type="pil", sources=(), transforms=(), layers=False, format="png",
                brush=gr.Brush(default_size=40, colors=[_BRUSH], color_mode="fixed"), eraser=gr.Eraser(default_size=40),
                elem_id="editor", height=470, placeholder="Upload a picture, or take the generated one.",
            )  # fmt: skip
            area = gr.Radio(list(AREAS), value=DRAWN, label="Repaint", info="What the brush covers, or a fixed part.")
        with gr.Column(min_width=300):
            asked = AskedFields(shared.model, several=False)
            seed = choose_seed()
            settings = Settings(shared.model)
            with gr.Row():
                start = gr.Button("Repaint", variant="primary", min_width=140, elem_id="repaint")
                stop = gr.Button("Stop", variant="stop", min_width=120)
            slider = gr.ImageSlider(
                label="Before and after: move the line", format="png", interactive=False, buttons=["fullscreen"],
                elem_classes="pixels", elem_id="edited",
            )  # fmt: skip
            pair = show_gallery("Before and after", "edited-pair")
            status = gr.Markdown(elem_id="edit-status")

    def show(source: str, picture: Image.Image, label: int, text: str) -> tuple[Any, ...]:
        return ({"background": enlarge(picture), "layers": [], "composite": None},)

    def start_edit(
        models: Models, source: str, picture: Image.Image | None, drawn: dict[str, Any] | None, area: str, label: int,
        text: str, seed: float, *values: Any,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        if picture is None:
            raise UserError("choose a picture first: upload one, or take the generated one")
        model, settings = models.load(source), Settings.read(values, seed)
        mask = build_mask(model.config.image_size, area, _find_drawing(drawn))
        fitted, condition = fit_image(model, picture), read_one(model, label, text)
        edited = models.run(lambda: repaint(model, fitted, mask, condition, settings))
        what = model.caption(condition) or "no text"
        told = f"Repainted {edited.repainted:.0%} of the picture as {what}, seed {int(seed)}."
        pictures = edited.before, edited.after
        yield tuple(map(enlarge, pictures)), fill_gallery(pictures, ["before", "after"]), told

    choice.bind(show, asked, [], [editor])
    stopping = StopButton(shared.models)
    stopping.start(
        start.click, start_edit,
        [shared.source, choice.picture, editor, area, *asked.components, seed, *settings.components],
        [slider, pair, status],
    )  # fmt: skip
    stopping.bind(stop)

    def refresh(model: Model) -> list[Any]:
        return [*asked.refresh(model), *Settings.refresh(model)]

    return [*asked.components, *settings.changing], refresh


def _find_drawing(drawn: dict[str, Any] | None) -> Image.Image | None:
    """What was drawn over the picture."""
    layers = (drawn or {}).get("layers") or []
    return layers[0] if layers else None
