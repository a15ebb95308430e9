"""The tab Compute: the full model beside one whose work is turned down, with equal seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from nextscale.demo.cheaper import (
    BUDGET,
    GUIDE,
    PRUNE,
    THRESHOLD,
    Amounts,
    Comparison,
    compare_cost,
    explain_ways,
    find_budgets,
    list_ways,
)
from nextscale.demo.growth import Request
from nextscale.demo.html import Cell, colour_map, draw_legend, draw_table
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
    show_gallery,
)


def build(shared: Shared) -> tuple[list[Any], Refresh]:
    """Lay out the tab; its components that depend on the model, and their values for another one."""
    explanation = gr.Markdown(explain_ways(shared.model))
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            way = _choose_way(shared.model)
            sliders = _build_sliders(shared.model)
            asked = AskedFields(shared.model)
            each = choose_each()
            seed = choose_seed()
            settings = Settings(shared.model)
            with gr.Row():
                start = gr.Button("Compare cost", variant="primary", scale=2, min_width=160, elem_id="compute-start")
                stop = gr.Button("Stop", variant="stop", min_width=90)
        with gr.Column(scale=2, min_width=300), gr.Row():
            full = show_gallery("Full model", "compute-full")
            reduced = show_gallery("Reduced", "compute-reduced")
    table = gr.HTML(elem_id="compute-table")
    maps = gr.HTML(elem_id="compute-maps")

    def compute(
        models: Models, source: str, way: str, tau: float, budget: float, prune: float, guided: float,
        classes: list[int], texts: str, each: float, seed: float, *values: Any,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        request = Request(read_asked(models.load(source), classes, texts, each), Settings.read(values, seed))
        amounts = Amounts(float(tau), float(budget), float(prune), int(guided))
        for found in compare_cost(models, source, way, request, amounts):
            shown = [fill_gallery(g.pictures, g.captions) if g else [] for g in (found.full, found.reduced)]
            yield (*shown, draw_cost(found, way), draw_maps(found))

    stopping = StopButton(shared.models)
    stopping.start(
        start.click, compute,
        [shared.source, way, *sliders.values(), *asked.components, each, seed, *settings.components],
        [full, reduced, table, maps],
    )  # fmt: skip
    stopping.bind(stop)
    way.change(
        lambda way: [gr.update(visible=way == name) for name in sliders], [way], list(sliders.values()), queue=False,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip

    def refresh(model: Model) -> list[Any]:
        ways = list_ways(model)
        low, high = find_budgets(model) or (0.5, 1.0)
        return [
            explain_ways(model), gr.update(choices=ways, value=ways[0]),
            gr.update(minimum=_round_up(low), maximum=1, value=min(0.8, high)),
            gr.update(maximum=len(model.config.pyramid), value=_choose_guided(model)), *asked.refresh(model),
            *Settings.refresh(model),
        ]  # fmt: skip

    changing = [explanation, way, sliders[BUDGET], sliders[GUIDE], *asked.components, *settings.changing]
    return changing, refresh


def _choose_way(model: Model) -> Any:
    ways = list_ways(model)
    return gr.Dropdown(ways, value=ways[0], label="What to turn down", info="The full model beside it stays as it is.")


def _build_sliders(model: Model) -> dict[str, Any]:
    """A slider for each way that has an amount; that of the first way is shown."""
    chosen, default = list_ways(model)[0], Amounts()
    low, high = find_budgets(model) or (0.5, 1.0)
    return {
        THRESHOLD: gr.Slider(
            0, 1, value=default.tau, step=0.01, label="Threshold", visible=chosen == THRESHOLD,
            info="1: all experts work. 0: one at each position.",
        ),
        BUDGET: gr.Slider(
            _round_up(low), 1, value=min(default.budget, high), step=0.01, label="Budget", visible=chosen == BUDGET,
            info="The share of the full model's FLOPs that thresholds were calibrated for.",
        ),
        PRUNE: gr.Slider(
            0.1, 0.9, value=default.prune, step=0.05, label="Share left out", visible=chosen == PRUNE,
            info="The share of the last scale's tokens that the later blocks leave out.",
        ),
        GUIDE: gr.Slider(
            1, len(model.config.pyramid), value=_choose_guided(model), step=1, label="Guided scales",
            visible=chosen == GUIDE, info="The first so many scales are guided; the others cost half.",
        ),
    }  # fmt: skip


def _choose_guided(model: Model) -> int:
    return min(Amounts().guided, len(model.config.pyramid))


def _round_up(share: float) -> float:
    """The smallest step of the slider that is not below a share."""
    return -(-int(share * 1000) // 10) / 100


def draw_cost(found: Comparison, way: str) -> str:
    """The table of times and FLOPs."""
    heads, *rows = found.list_rows()
    return draw_table(heads, [(row[0], row[1:]) for row in rows], f"Cost with equal seeds: {way[0].lower()}{way[1:]}")


def draw_maps(found: Comparison) -> str:
    """The map of experts of the first picture; empty where none were turned down."""
    if found.maps is None:
        return ""
    rows: list[tuple[str, list[Cell | str]]] = []
    for name, values, picture in zip(found.maps.scales, found.maps.maps, found.maps.pictures, strict=True):
        mean = sum(map(sum, values)) / sum(map(len, values))
        so_far = Cell(picture, f"the picture up to scale {name}")
        experts = Cell(colour_map(values), f"experts at each position of scale {name}: {mean:.0%} on average")
        rows.append((name, [so_far, experts, f"{mean:.0%}"]))
    title = "Experts that worked at each position of the first picture, mean over blocks"
    heads = ["scale", "up to it", "experts", "mean"]
    return draw_table(heads, rows, title) + draw_legend("0 %", "100 % of the experts")
