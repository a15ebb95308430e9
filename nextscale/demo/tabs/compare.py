"""The tab Compare: two models or two settings side by side, with equal classes or texts, and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from nextscale.demo.comparing import Side, compare_sides, draw_sides
from nextscale.demo.editing import enlarge
from nextscale.demo.models import Model, Models
from nextscale.demo.tabs.controls import (
    AskedFields,
    Refresh,
    Settings,
    Shared,
    StopButton,
    choose_each,
    choose_seed,
    fill_gallery,
    read_asked,
    read_seed,
    show_gallery,
)

_HELP = """The same classes or texts, and the same seeds, so that each picture has its counterpart. A folder of another
model can be typed in."""
_TYPES = [("that of the page", ""), "float32", "bfloat16", "float16", "int8"]


def build(shared: Shared) -> tuple[list[Any], Refresh]:
    """Lay out the tab; its components that depend on the model, and their values for another one."""
    gr.Markdown(_HELP)
    with gr.Row():
        with gr.Column(min_width=260):
            asked = AskedFields(shared.model)
        with gr.Column(min_width=260):
            each = choose_each()
            seed = choose_seed()
    sides, changing = [], list[Any]()
    with gr.Row():
        for name in "AB":
            with gr.Column(min_width=300):
                gr.Markdown(f"### {name}")
                source = gr.Dropdown(
                    shared.models.sources, value=shared.model.source, allow_custom_value=True, label=f"Model {name}",
                    info="One of the list, or a folder.",
                )  # fmt: skip
                dtype = gr.Dropdown(_TYPES, value="", label="Type", info="What it computes in.")
                settings = Settings(shared.model)
                sides.append([source, dtype, *settings.components])
                changing += [source, *settings.changing]
    with gr.Row():
        start = gr.Button("Compare", variant="primary", min_width=140, elem_id="compare-start")
        stop = gr.Button("Stop", variant="stop", min_width=120)
    with gr.Row():
        galleries = [show_gallery(name, f"compare-{name}") for name in "AB"]
    table = gr.HTML(elem_id="compare-table")
    slider = gr.ImageSlider(
        label="A and B: move the line; click a picture of A for another one", format="png", interactive=False,
        buttons=["fullscreen"], elem_classes="pixels", elem_id="compare-slider",
    )  # fmt: skip
    pairs = gr.State(None)
    width = len(sides[0])

    def compare(
        models: Models, shown_source: str, classes: list[int], texts: str, each: float, seed: float, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        conditions, number = read_asked(models.load(shown_source), classes, texts, each), read_seed(seed)
        fields = [values[:width], values[width:]]
        a, b = (Side(source, dtype, Settings.read(rest, number)) for source, dtype, *rest in fields)
        for grown in compare_sides(models, shown_source, a, b, conditions):
            shown = [fill_gallery(g.pictures, g.captions) if g else gr.skip() for g in grown]
            done = grown[1] is not None and grown[1].done
            yield (*shown, draw_sides(grown), grown if done else None, _pair(grown, 0) if done else gr.skip())

    outputs = [*galleries, table, pairs, slider]
    stopping = StopButton(shared.models)
    stopping.start(
        start.click, compare, [shared.source, *asked.components, each, seed, *sides[0], *sides[1]], outputs,
    )  # fmt: skip
    stopping.bind(stop)
    galleries[0].select(_select, [pairs], [slider], queue=False, show_progress="hidden", api_visibility="private")

    def refresh(model: Model) -> list[Any]:
        return [*asked.refresh(model), *(2 * [gr.update(value=model.source), *Settings.refresh(model)])]

    return [*asked.components, *changing], refresh


def _select(grown: Any, event: gr.SelectData) -> Any:
    return gr.skip() if grown is None else _pair(grown, int(event.index))


def _pair(grown: Any, number: int) -> Any:
    return tuple(enlarge(growth.pictures[number]) for growth in grown)
