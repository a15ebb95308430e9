"""The pictures of the page in docs/demo: `python -m tests.screenshots OUT MODEL DYNAMIC MIXTURE`.

MODEL is the one of most tabs, DYNAMIC has dynamic experts (Compute), MIXTURE is a mixture of experts (Inside).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser import Visitor, open_browser, serve_models


def choose_model(visitor: Visitor, source: str) -> None:
    """Turn the page to another of its models."""
    box = visitor.page.get_by_label("Model", exact=True)
    box.click()
    box.fill(source)
    visitor.page.get_by_role("option", name=source).click()
    visitor.page.get_by_text(f"{source}: ").wait_for()


def show_generate(visitor: Visitor, models: list[str]) -> None:
    """Four pictures, with the lines that give them again."""
    visitor.page.get_by_label("Keep this seed").check()
    visitor.generate()
    visitor.page.get_by_text("The same pictures without this page").click()


def show_edit(visitor: Visitor, models: list[str]) -> None:
    """A part that was drawn, and a slider between before and after."""
    visitor.generate()
    visitor.tab("Edit")
    visitor.button("Take the generated one").click()
    draw(visitor)
    visitor.button("Repaint").click()
    visitor.wait_for_text("edit-status", "Repainted")


def draw(visitor: Visitor) -> None:
    """Paint a stroke across the middle of the picture in the editor."""
    canvas = visitor.page.locator("#editor canvas").first
    canvas.wait_for()
    visitor.page.wait_for_timeout(1500)  # the editor fits the picture into its frame
    box = canvas.bounding_box()
    assert box is not None, "the canvas is visible"
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.page.mouse.move(x - 60, y)
    visitor.page.mouse.down()
    for step in range(13):
        visitor.page.mouse.move(x - 60 + 10 * step, y + (20 if step % 2 else -20))
    visitor.page.mouse.up()
    visitor.page.wait_for_timeout(500)


def show_compute(visitor: Visitor, models: list[str]) -> None:
    """A model with dynamic experts beside itself."""
    choose_model(visitor, models[1])
    visitor.tab("Compute")
    visitor.button("Compare cost").click()
    visitor.wait_for_text("compute-maps", "mean over blocks")


def show_inside(visitor: Visitor, models: list[str]) -> None:
    """A mixture's view of a generated picture."""
    choose_model(visitor, models[2])
    visitor.generate()
    visitor.tab("Inside")
    visitor.button("Take the generated one").click()
    visitor.wait_for_text("inside-experts", "share of the scale's work")


def show_compare(visitor: Visitor, models: list[str]) -> None:
    """A model beside itself in 8 bits."""
    visitor.tab("Compare")
    box = visitor.page.get_by_label("Type", exact=True).locator("visible=true").nth(1)
    box.click()
    visitor.page.get_by_role("option", name="int8").click()
    visitor.button("Compare").click()
    visitor.page.locator("#compare-table td", has_text="int8").wait_for()
    visitor.page.locator("#compare-slider img").nth(1).wait_for()


TABS = {
    "generate": show_generate, "edit": show_edit, "compute": show_compute, "inside": show_inside,
    "compare": show_compare,
}  # fmt: skip


def take_pictures(browser: Any, address: str, models: list[str], out: Path, names: list[str]) -> None:
    """Every tab, light and dark and, one of them, on a narrow screen."""
    for name in names:
        forms = {"light": {}, "dark": {"dark": True}} | ({"narrow": {"width": 390}} if name == "generate" else {})
        for form, options in forms.items():
            visitor = Visitor(browser, address, **options)
            TABS[name](visitor, models)
            visitor.page.wait_for_function("[...document.images].every(image => image.complete)")
            visitor.page.wait_for_timeout(2000)  # what moves or fades has come to rest
            path = out / f"{name}-{form}.png"
            visitor.page.mouse.move(2, 2)
            visitor.page.screenshot(path=str(path), full_page=True)
            Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE).save(path, optimize=True)
            visitor.close()
            print(f"{path}: {path.stat().st_size:,} bytes; problems: {visitor.problems}")


def main() -> None:
    """Take the pictures; without further words all tabs."""
    out, models, names = Path(sys.argv[1]), sys.argv[2:5], sys.argv[5:] or list(TABS)
    out.mkdir(parents=True, exist_ok=True)
    with serve_models(*models) as (_, address), open_browser() as browser:
        take_pictures(browser, address, models, out, names)


if __name__ == "__main__":
    main()
