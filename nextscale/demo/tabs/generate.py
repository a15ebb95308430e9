"""The tab Generate: pictures of classes or texts, growing scale by scale."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from nextscale.demo.growth import Growth, Request, grow
from nextscale.demo.models import Model, Models, Stopped
from nextscale.demo.recipe import write_command, write_python
from nextscale.demo.tabs.controls import (
    AskedFields,
    Refresh,
    Settings,
    Shared,
    StopButton,
    choose_each,
    choose_seed,
    draw_seed,
    fill_gallery,
    read_asked,
    show_gallery,
    tell_errors,
)

_HINTS = {False: "Choose classes, then Generate.", True: "Write a text on each line, then Generate."}
"""Whether the model reads texts, and what to do."""
_SURPRISES = 4
"""Classes that "Surprise me" chooses."""


def build(shared: Shared) -> tuple[list[Any], Refresh]:
    """Lay out the tab; its components that depend on the model, and their values for another one."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            asked = AskedFields(shared.model)
            each = choose_each()
            with gr.Row():
                seed = choose_seed()
                keep = gr.Checkbox(label="Keep this seed", info="Otherwise each click draws a new one.")
            settings = Settings(shared.model)
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Row():
                surprise = gr.Button("Surprise me", min_width=120, visible=not shared.model.reads_text)
                stop = gr.Button("Stop", variant="stop", min_width=120, elem_id="stop")
        with gr.Column(scale=2, min_width=300):
            gallery, scale, status, *again = _lay_out_results(shared.model)
    outputs = [seed, gallery, scale, status, shared.generated, shared.selected, *again]

    def generate(
        models: Models, source: str, classes: list[int], texts: str, each: float, seed: float, keep: bool,
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        model = models.load(source)
        request = Request(
            read_asked(model, classes, texts, each), Settings.read(settings, seed if keep else draw_seed())
        )
        yield from _show_growth(models, model, request)

    def choose_surprise(source: str) -> list[int]:
        numbers = range(shared.models.load(source).classes)
        return sorted(random.SystemRandom().sample(numbers, min(_SURPRISES, len(numbers))))

    inputs = [shared.source, *asked.components, each, seed, keep, *settings.components]
    stopping = StopButton(shared.models)
    stopping.start(start.click, generate, inputs, outputs)
    chosen = surprise.click(tell_errors(choose_surprise), [shared.source], [asked.classes], api_visibility="private")
    stopping.start(chosen.success, generate, inputs, outputs)
    stopping.bind(stop, _describe_stop, [shared.generated], [status])
    scale.input(
        _show_scale, [shared.generated, scale], [gallery], queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    gallery.select(_select, None, [shared.selected], queue=False, api_visibility="private")

    def refresh(model: Model) -> list[Any]:
        scales = len(model.config.pyramid)
        slider, file = gr.update(maximum=scales, value=scales), gr.update(value=None, interactive=False)
        hint, surprising = _HINTS[model.reads_text], gr.update(visible=not model.reads_text)
        return [*asked.refresh(model), surprising, slider, *Settings.refresh(model), [], hint, file, "", ""]

    return [*asked.components, surprise, scale, *settings.changing, gallery, status, *again], refresh


def _lay_out_results(model: Model) -> tuple[Any, ...]:
    """The gallery, the slider, the status, the button of the download, the command line and the Python lines."""
    scales = len(model.config.pyramid)
    gallery = show_gallery("Pictures", "pictures")
    scale = gr.Slider(
        1, scales, value=scales, step=1, label="Scale", elem_id="scale",
        info="The pictures after so many scales, from coarse to fine.",
    )  # fmt: skip
    status = gr.Markdown(_HINTS[model.reads_text], elem_id="status")
    download = gr.DownloadButton("Download the pictures (PNG)", interactive=False, elem_id="download")
    lines: dict[str, Any] = {"interactive": False, "wrap_lines": True, "lines": 1, "show_line_numbers": False}
    with gr.Accordion("The same pictures without this page", open=False):
        command = gr.Code(label="Command line", language=None, elem_id="command", **lines)
        python = gr.Code(label="Python", language="python", elem_id="python", **lines)
    return gallery, scale, status, download, command, python


def _show_growth(models: Models, model: Model, request: Request) -> Iterator[tuple[Any, ...]]:
    """The values of the outputs after each scale, and once more when it is stopped."""
    growth, again = None, (write_command(model, request), write_python(model, request))
    last = len(model.config.pyramid)
    try:
        for growth in models.iterate(grow(model, request)):
            file = gr.update(interactive=False)
            if growth.done:
                path = Path(tempfile.mkdtemp(dir=models.folder)) / "grid.png"
                file = gr.update(value=str(growth.write(path)), interactive=True)
            at = gr.update(value=len(growth.scales), maximum=last)
            shown = fill_gallery(growth.pictures, growth.captions)
            yield request.settings.seed, shown, at, growth.describe(), growth, 0, file, *again
    except Stopped:
        yield *3 * (gr.skip(),), _describe_stop(growth), *5 * (gr.skip(),)


def _show_scale(growth: Growth | None, scale: float) -> Any:
    """The pictures after so many scales; the last that is done where the scale is not."""
    if growth is None:
        return gr.skip()
    return fill_gallery(growth.scales[min(int(scale), len(growth.scales)) - 1], growth.captions)


def _describe_stop(growth: Growth | None) -> Any:
    if growth is None or growth.done:
        return "Stopped."
    return f"Stopped after {growth.describe().removesuffix('...')}"


def _select(event: gr.SelectData) -> int:
    return int(event.index)
