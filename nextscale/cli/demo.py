"""The command that shows a model in the browser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from nextscale.cli.files import list_inputs
from nextscale.common.dtypes import SamplingDtype
from nextscale.config.parse import check_fields

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output


@dataclass
class Demo:
    """Show models in the browser: generate, edit, compare, save compute, look inside. On this machine alone."""

    models: Positional[tuple[str, ...]] = ()
    """Checkpoint folders, or names on the Hugging Face hub; the page shows the first one and lets you choose another.
    Without any: models/var-letters, models/var-cifar10 and runs/quickstart, if they exist."""
    port: int = 0
    """Port of the page on 127.0.0.1; 0 = the first free one from 7860 on."""
    open: bool = False
    """Also open the page in the web browser of this machine."""
    dtype: SamplingDtype = "auto"
    """float32, bfloat16, float16, or auto: the fastest that is right for the device and the model. int8: products in
    8 bits, faster still on a CPU, with slightly other images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def check(self) -> None:
        check_fields("", self, {"port must be 0 or 1024 to 65535": self.port == 0 or 1024 <= self.port <= 65535})

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.demo.models import find_sources

        find_sources(self.models)
        return [], list_inputs(models={"MODEL": self.models})

    def list_needs(self) -> dict[str, str]:
        return {"gradio": "the page"}

    def run(self) -> None:
        from nextscale.demo.models import Models
        from nextscale.demo.page import run_page

        models = Models(self.models, dtype=self.dtype, device=self.device)
        try:
            run_page(models, self.port, self.open)
        finally:
            models.close()
