"""The page of `nextscale demo` in Debian's chromium, driven by playwright: what its test and its screenshots share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:")
WAIT = 120_000
"""Milliseconds; on a busy machine pictures take their time."""


def explain_missing() -> str:
    """What is not installed here, in one line; empty where a page can be driven."""
    packages = [name for name in ("gradio", "playwright") if find_spec(name) is None]
    missing = packages + ([] if CHROMIUM else ["chromium (apt-get install chromium)"])
    return f"not installed: {', '.join(missing)}" if missing else ""


@contextmanager
def serve_models(*sources: str) -> Iterator[tuple[Any, str]]:
    """The models, and the address of their page, served by this process."""
    from nextscale.demo.models import Models
    from nextscale.demo.page import build_page, serve

    models = Models(sources, dtype="float32", device="cpu")
    try:
        os.environ["GRADIO_TEMP_DIR"] = models.folder
        with serve(build_page(models), folder=models.folder) as address:
            yield models, address
    finally:
        models.close()


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """A browser tab with the page, and what went wrong in it."""

    def __init__(self, browser: Any, address: str, width: int = 1200, height: int = 800, dark: bool = False):
        """Opens the page. `dark`: as in a browser that is set to dark pages."""
        scheme = "dark" if dark else "light"
        self.page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        self.page.set_default_timeout(WAIT)
        self.problems: list[str] = []
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._note_request)
        self.page.goto(address)
        self.button("Generate").wait_for()

    def _note_console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith(LOCAL):
            self.problems.append(f"request to another machine: {request.url}")

    def tab(self, name: str) -> None:
        """Turn to a tab; on a narrow screen the last ones are in a menu.

        The page moves tabs into the menu some time after the window has changed: a click may find its tab gone.
        """
        from playwright.sync_api import TimeoutError as TooLate

        chosen = self.page.get_by_role("tab", name=name, exact=True)
        for _ in range(WAIT // 2_000):
            with suppress(TooLate):
                if chosen.locator("visible=true").count():
                    chosen.locator("visible=true").click(timeout=1_000)
                else:
                    self.page.locator(".overflow-menu > button").click(timeout=1_000)
                    self.page.locator(".overflow-dropdown button", has_text=name).click(timeout=1_000)
                return
        raise AssertionError(f"the page has no tab {name}")

    def button(self, name: str) -> Any:
        """The visible button of this name."""
        return self.page.get_by_role("button", name=name, exact=True).locator("visible=true")

    def text(self, name: str) -> str:
        """The text of the component of this name."""
        return str(self.page.locator(f"#{name}").inner_text())

    def wait_for_text(self, name: str, text: str) -> None:
        """Until the component of this name has this text."""
        self.page.locator(f"#{name}").get_by_text(text).first.wait_for()

    def generate(self) -> None:
        """Click Generate, and wait for the last scale."""
        self.button("Generate").click()
        self.wait_for_text("status", "images a second")

    def pictures(self, name: str = "pictures") -> list[str]:
        """The addresses of the pictures in a gallery."""
        images = self.page.locator(f"#{name} .grid-container img")
        return [images.nth(i).get_attribute("src") for i in range(images.count())]

    def wait_for_other_pictures(self, shown: list[str], name: str = "pictures") -> None:
        """Until the gallery shows other pictures than these."""
        self.page.wait_for_function(
            "([name, shown]) => { const images = [...document.querySelectorAll(`#${name} .grid-container img`)];"
            " return images.length && images.every(image => !shown.includes(image.getAttribute('src'))); }",
            arg=[name, shown],
        )

    def close(self) -> None:
        """Close the tab."""
        self.page.context.close()
