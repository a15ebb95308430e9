"""What several tabs share: choosing classes and settings, messages for errors, galleries of pictures."""

from __future__ import annotations

import functools
import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.demo.growth import MOST_PICTURES, Request
from nextscale.demo.models import Asked, Model, Models, Stopped

NO_LABEL = -1
"""What stands for no label among the numbers of the classes."""
_TELL_TIME = "(clock, ...values) => [Date.now(), ...values]"
"""Puts the time of the click, in milliseconds, in the place of the first input."""
_LARGEST_SEED = 2**31 - 1
_ERROR_SECONDS = 20
_CHOSEN = 4
"""Classes that are chosen at the start."""
Refresh = Callable[[Model], list[Any]]
"""The values of a tab's components for another model, in the order of the components."""


@dataclass(frozen=True)
class Shared:
    """What a tab is given by the page."""

    models: Models
    model: Model
    """The model that is chosen at the start."""
    source: Any
    """The component that holds the chosen model's folder."""
    generated: Any
    """The visitor's last pictures of the tab Generate: a `Growth` or None."""
    selected: Any
    """The number of the one that was clicked last."""


def tell_errors(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, a function or a generator, with a UserError as a message in the page."""

    @functools.wraps(work)
    def call(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except UserError as error:
            raise _show(error) from error

    @functools.wraps(work)
    def iterate(*arguments: Any) -> Iterator[Any]:
        try:
            yield from work(*arguments)
        except UserError as error:
            raise _show(error) from error

    return iterate if inspect.isgeneratorfunction(work) else call


class StopButton:
    """What a visitor started with a tab's buttons ends when the visitor clicks Stop.

    It ends by itself, between two of its pieces: gradio's own way (`cancels`) now and then writes "Error" over the
    outputs of what it cancelled. Which click came first is told by the browser's clock, because the server may begin a
    request after it was stopped.
    """

    def __init__(self, models: Models):
        self._models = models
        self._clock = gr.Number(visible=False)
        self._stops: defaultdict[str, float] = defaultdict(float)
        """When each visitor clicked Stop last; milliseconds."""

    def start(self, event: Callable[..., Any], work: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        """Have an event, such as a button's click, start `work`, a generator whose first argument is the models, for
        this visitor and until Stop is clicked."""

        def iterate(visitor: gr.Request, clicked: float, *arguments: Any) -> Iterator[Any]:
            models = self._models.until(lambda: self._stops[str(visitor.session_hash)] >= clicked)
            try:
                yield from tell_errors(work)(models, *arguments)
            except Stopped:
                return

        event(
            iterate, [self._clock, *inputs], outputs, js=_TELL_TIME,
            concurrency_id="model", api_visibility="private",
        )  # fmt: skip

    def bind(
        self, button: Any, describe: Callable[..., Any] = lambda: None, inputs: Sequence[Any] = (), output: Any = None
    ) -> None:
        """Give the button its click; what `describe` says of the inputs is written in the output at once."""

        def stop(visitor: gr.Request, clicked: float, *arguments: Any) -> Any:
            self._stops[str(visitor.session_hash)] = clicked
            return describe(*arguments)

        button.click(
            stop, [self._clock, *inputs], output, js=_TELL_TIME, queue=False,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip


def _show(error: UserError) -> Exception:
    shown: Exception = gr.Error(str(error), title="This does not work", duration=_ERROR_SECONDS, print_exception=False)
    return shown


def list_classes(model: Model) -> list[tuple[str, int]]:
    """Names and numbers of the classes, and no label."""
    names = model.config.class_names or tuple(f"class {i}" for i in range(model.classes))
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    shown = [f"{name} ({i})" if name in twice else name for i, name in enumerate(names)]
    return [*zip(shown, range(model.classes), strict=True), ("no label", NO_LABEL)]


class AskedFields:
    """The fields for what pictures show: classes, or texts where the model reads those. One of the two is visible."""

    def __init__(self, model: Model, several: bool = True, start: int = 0, info: str = ""):
        """`several`: classes, and a text on each line. `start`: the class at the start, of a single one."""
        self._several, self._start = several, start
        info = info or ("Type to search; several at once." if several else "Type to search.")
        self.classes = gr.Dropdown(
            list_classes(model), value=self._choose_first(model), multiselect=several, filterable=True,
            label="Classes" if several else "Class", info=info, visible=not model.reads_text,
        )  # fmt: skip
        self.texts = gr.Textbox(
            label="Texts" if several else "Text", lines=4 if several else 1, visible=model.reads_text,
            info="What the pictures show, a text on each line." if several else "What the picture shows.",
        )  # fmt: skip
        self.components = [self.classes, self.texts]

    def refresh(self, model: Model) -> list[Any]:
        """Their values for another model."""
        classes, text = list_classes(model), model.reads_text
        return [
            gr.update(choices=classes, value=self._choose_first(model), visible=not text), gr.update(visible=text)
        ]  # fmt: skip

    def _choose_first(self, model: Model) -> Any:
        first = list(range(min(_CHOSEN, model.classes)))
        return first if self._several else self._start if first else NO_LABEL


def read_one(model: Model, label: int | None, text: str | None) -> Asked:
    """What one picture is asked for with: the class that a dropdown holds, or the text; None for neither."""
    if model.reads_text:
        return (text or "").strip() or None
    return None if label is None or label == NO_LABEL else int(label)


def read_asked(model: Model, labels: Sequence[int], texts: str | None, each: float) -> tuple[Asked, ...]:
    """What all pictures are asked for with: each chosen class, or each line's text, so many times. UserError for none
    and for too many."""
    if model.reads_text:
        chosen: list[Asked] = [line.strip() for line in (texts or "").splitlines() if line.strip()]
    else:
        chosen = [read_one(model, label, None) for label in labels or ()]
    return Request(tuple(value for value in chosen for _ in range(int(each))), SampleConfig()).asked


def choose_each() -> Any:
    """How many pictures a class or a text gets."""
    return gr.Slider(
        1, 8, value=1, step=1, label="Pictures of each class or text", info=f"Up to {MOST_PICTURES} in all."
    )


def choose_seed() -> Any:
    """The field of the seed."""
    info = "The same seed gives the same pictures."
    return gr.Number(value=0, precision=0, minimum=0, label="Seed", info=info)


def draw_seed() -> int:
    """A seed at random."""
    return random.SystemRandom().randrange(_LARGEST_SEED)


def read_seed(value: float | None) -> int:
    """The seed in the field; UserError when it is empty."""
    if value is None:
        raise UserError("give a seed: a whole number, 0 or more")
    return int(value)


class Settings:
    """The fields of the sampling settings."""

    def __init__(self, model: Model, open_at_start: bool = False):
        default = SampleConfig()
        with gr.Accordion("Settings", open=open_at_start):
            cfg = gr.Slider(
                0, 10, value=default.cfg, step=0.1, label="Guidance",
                info="How strongly the class or the text is followed; 0 halves the work.",
            )  # fmt: skip
            top_k = self._choose_top_k(model)
            top_p = gr.Slider(
                0, 1, value=default.top_p, step=0.01, label="Top p",
                info="Keep the likeliest tokens that together have this probability; 0 keeps all.",
            )  # fmt: skip
            temperature = gr.Slider(
                0.1, 2, value=default.temperature, step=0.05, label="Temperature",
                info="Above 1 more varied, below 1 more alike.",
            )  # fmt: skip
            smooth = gr.Checkbox(
                value=default.smooth, label="Smooth", info="Mix codes instead of taking one for each position."
            )
        self.components = [cfg, top_k, top_p, temperature, smooth]
        self._top_k = top_k

    @staticmethod
    def _choose_top_k(model: Model) -> Any:
        codes = model.config.tokenizer.vocab_size
        return gr.Slider(
            0, codes, value=min(900, codes), step=1, label="Top k",
            info=f"Keep so many of the {codes:,} tokens, the likeliest ones; 0 keeps all.",
        )  # fmt: skip

    @property
    def changing(self) -> list[Any]:
        """The components that `refresh` sets."""
        return [self._top_k]

    @staticmethod
    def refresh(model: Model) -> list[Any]:
        """Their values for another model."""
        codes = model.config.tokenizer.vocab_size
        info = f"Keep so many of the {codes:,} tokens, the likeliest ones; 0 keeps all."
        return [gr.update(maximum=codes, value=min(900, codes), info=info)]

    @staticmethod
    def read(values: Sequence[Any], seed: float | None) -> SampleConfig:
        """The settings in the fields. UserError for values outside their ranges."""
        cfg, top_k, top_p, temperature, smooth = values
        return SampleConfig(
            cfg=float(cfg), top_k=int(top_k), top_p=float(top_p), temperature=float(temperature), smooth=bool(smooth),
            seed=read_seed(seed),
        )  # fmt: skip


def show_gallery(label: str, name: str) -> Any:
    """A gallery of generated pictures. PNG keeps every pixel as it is."""
    return gr.Gallery(
        label=label, format="png", object_fit="contain", height="auto",
        interactive=False, buttons=["download", "fullscreen"], elem_classes="pixels", elem_id=name,
    )  # fmt: skip


def fill_gallery(pictures: Sequence[Image.Image], captions: Sequence[str]) -> list[tuple[Image.Image, str]]:
    """What a gallery shows."""
    return list(zip(pictures, captions, strict=True))
