"""The page: its tabs, its looks, and the server on this machine. Needs gradio.

Nothing is asked of other machines: fonts are the system's, and gradio's reports of use are off.
"""

from __future__ import annotations

import os
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nextscale.common.errors import UserError
from nextscale.demo.models import Model, Models

ADDRESS = "127.0.0.1"
_AT_ONCE = 8
"""Requests that are begun: they take turns on the models' thread. Further ones wait until one has ended, and are not
stopped before."""
_FONTS = ("system-ui", "sans-serif")
_FIXED_FONTS = ("ui-monospace", "Consolas", "monospace")
_CSS = """
.pixels img, .table img { image-rendering: pixelated; }
.pixels .grid-wrap { min-height: 0 !important; max-height: none !important; }
.pixels .grid-container {
  grid-template-columns: repeat(auto-fit, minmax(100px, 1fr)) !important; grid-template-rows: none !important;
}
.pixels .thumbnail-item { max-width: 300px; }
.table { overflow-x: auto; }
.table table { border-collapse: collapse; width: auto; margin: 0; }
.table th, .table td { border: 1px solid var(--border-color-primary) !important; }
.table th, .table td { padding: 0.25em 0.6em; text-align: center; white-space: nowrap; font-weight: normal; }
.table th[scope=row] { text-align: left; font-weight: 600; }
.table img { width: 72px; height: auto; margin: 0 auto; display: block; }
.title { font-weight: 600; padding: 0.4em 0; }
.legend .bar { display: inline-block; width: 8em; height: 0.8em; vertical-align: middle; border-radius: 2px; }
"""


def build_page(models: Models) -> Any:
    """The page as gradio's Blocks. The first model is loaded. UserError when it cannot be."""
    import gradio as gr

    from nextscale.demo.tabs import compare, compute, edit, generate, inside
    from nextscale.demo.tabs.controls import Shared, tell_errors

    model = models.load(models.sources[0])
    tabs = {
        "Generate": generate.build,
        "Edit": edit.build,
        "Compute": compute.build,
        "Inside": inside.build,
        "Compare": compare.build,
    }
    with gr.Blocks(title="nextscale", analytics_enabled=False) as page:
        gr.Markdown("# nextscale")
        source = gr.Dropdown(models.sources, value=model.source, label="Model", visible=len(models.sources) > 1)
        summary = gr.Markdown(describe(model))
        shared = Shared(models, model, source, gr.State(None), gr.State(0))
        built = []
        for name, build in tabs.items():
            with gr.Tab(name, id=name):
                built.append(build(shared))
        changing = [component for components, _ in built for component in components]

        def refresh(source: str) -> list[Any]:
            chosen = models.load(source)
            return [describe(chosen), None, 0, *(value for _, values in built for value in values(chosen))]

        outputs = [summary, shared.generated, shared.selected, *changing]
        source.change(tell_errors(refresh), [source], outputs, api_visibility="private")
    return page


def describe(model: Model) -> str:
    """A model in one line."""
    return f"{model.source}: {model.config.summarize()}, computed in {model.dtype} on {model.pipeline.device}"


@contextmanager
def serve(page: Any, port: int = 0, folder: str | None = None) -> Iterator[str]:
    """Serve the page on this machine alone; the address. `port`: 0 = the first free one from 7860 on. `folder`: for
    uploads and pictures. UserError when the port is in use."""
    import gradio as gr

    _keep_local()
    theme = gr.themes.Default(primary_hue="blue", font=list(_FONTS), font_mono=list(_FIXED_FONTS)).set(
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400"
    )
    try:
        _, address, _ = page.queue(default_concurrency_limit=_AT_ONCE, api_open=False).launch(
            server_name=ADDRESS, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True,
            show_error=True, footer_links=[], enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
            theme=theme, css=_CSS, allowed_paths=[folder] if folder else None,
        )  # fmt: skip
    except OSError as error:
        where = f"port {port} is" if port else "all ports from 7860 to 7959 are"
        raise UserError(f"{where} in use at {ADDRESS}: give another --port") from error
    try:
        yield address
    finally:
        page.close(verbose=False)


def run_page(models: Models, port: int = 0, open_browser: bool = False) -> None:
    """Serve the page until Ctrl-C, and print its address."""
    os.environ["GRADIO_TEMP_DIR"] = models.folder
    page = build_page(models)
    with serve(page, port, models.folder) as address:
        print(f"the page is at {address} (on this machine alone); Ctrl-C ends it", flush=True)
        if open_browser:
            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("the page has ended")


def _keep_local() -> None:
    """Requests to this machine go past a proxy: gradio asks itself once whether it can be reached."""
    for name in ("NO_PROXY", "no_proxy"):
        listed = os.environ.get(name, "")
        os.environ[name] = ",".join(filter(None, (listed, ADDRESS)))
