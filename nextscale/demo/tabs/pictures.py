"""Choosing a picture to work on: an upload, or one of those that were generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.demo.editing import fit_image
from nextscale.demo.growth import Growth
from nextscale.demo.tabs.controls import NO_LABEL, AskedFields, Shared, tell_errors


class PictureChoice:
    """Two buttons, and the chosen picture in the size of the model that was chosen then."""

    def __init__(self, shared: Shared, name: str):
        """`name`: what makes the components' names on the page different from those of other tabs."""
        self._shared = shared
        with gr.Row():
            self._upload = gr.UploadButton(
                "Upload a picture",
                file_types=["image"],
                type="filepath",
                size="md",
                min_width=180,
                elem_id=f"upload-{name}",
            )
            self._take = gr.Button("Take the generated one", size="md", min_width=180, elem_id=f"take-{name}")
        gr.Markdown("The generated one is the picture that you clicked last in the tab Generate, else the first.")
        self.picture = gr.State(None)

    def bind(self, show: Callable[..., Any], asked: AskedFields, inputs: list[Any], outputs: list[Any]) -> None:
        """Show a picture when it is chosen: `show(source, picture, label, text, *inputs)` gives the values of the
        outputs.

        `asked`: the fields of the class and the text, which become those of a generated picture."""
        shared = self._shared

        def read_upload(source: str, file: str, label: int, text: str, *values: Any) -> tuple[Any, ...]:
            picture = load_upload(shared, source, file)
            return picture, label, text, *show(source, picture, label, text, *values)

        def take(source: str, growth: Growth | None, number: int, *values: Any) -> tuple[Any, ...]:
            picture, label, text = take_generated(shared, source, growth, number)
            return picture, label, text, *show(source, picture, label, text, *values)

        options = {"concurrency_id": "model", "api_visibility": "private"}
        shown = [self.picture, *asked.components, *outputs]
        self._upload.upload(
            tell_errors(read_upload), [shared.source, self._upload, *asked.components, *inputs], shown, **options
        )
        self._take.click(
            tell_errors(take), [shared.source, shared.generated, shared.selected, *inputs], shown, **options
        )


def load_upload(shared: Shared, source: str, file: str) -> Image.Image:
    """An uploaded file in the model's size. UserError when it is no image."""
    model = shared.models.load(source)
    try:
        return fit_image(model, file)
    except UserError as error:
        raise UserError(str(error).replace(file, Path(file).name)) from error


def take_generated(shared: Shared, source: str, growth: Growth | None, number: int) -> tuple[Image.Image, int, str]:
    """The generated picture of this number, its class as a dropdown holds it, and its text. UserError when there is
    none yet."""
    if growth is None or not growth.done:
        raise UserError("there is no generated picture yet: make one in the tab Generate")
    at = number if number < len(growth.pictures) else 0
    asked = growth.request.asked[at]
    label, text = (asked, "") if isinstance(asked, int) else (NO_LABEL, asked or "")
    return fit_image(shared.models.load(source), growth.pictures[at]), label, text
