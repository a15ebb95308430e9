"""The models that the page offers, and the one thread on which all of them work.

Modules are shared by all visitors, so their work is done one piece after the other: a piece is one scale of a batch, or
one pass. Two requests may take turns, because what a request needs from one piece to the next is its own.
"""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nextscale.checkpoints.native import find_folder, read_config
from nextscale.common.errors import UserError
from nextscale.common.precision import get_name
from nextscale.conditions import read_condition
from nextscale.config.model import ModelConfig
from nextscale.pipeline import Pipeline

T = TypeVar("T")
Asked = int | str | None
"""What a picture is asked for with: a class, or a text where the model reads texts; None for neither."""
DEFAULTS = ("models/var-letters", "models/var-cifar10", "runs/quickstart")
"""Where a model is looked for when none is given: those of the repository, and what the quickstart trains."""
_SECONDS_BETWEEN_LOOKS = 0.1
"""How often one who waits for the thread looks whether it was stopped."""


class Stopped(Exception):
    """Who asked does not want the rest any more."""


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model, and how it was asked for."""

    source: str
    """The folder, or the name on the hub, as it was given."""
    folder: Path
    pipeline: Pipeline
    origin: dict[str, Any]
    """What the checkpoint says of how it was made."""

    @property
    def config(self) -> ModelConfig:
        return self.pipeline.config

    @property
    def dtype(self) -> str:
        """The type of the weights by its name, such as float32."""
        return get_name(self.pipeline.dtype)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.config.count_of_classes or 0

    @property
    def reads_text(self) -> bool:
        """Whether pictures are asked for with texts in place of classes."""
        return not self.classes

    def give(self, asked: Sequence[Asked]) -> dict[str, Any]:
        """Keywords of `Pipeline.sample` for these classes or texts."""
        return {"prompts" if self.reads_text else "labels": list(asked)}

    def caption(self, asked: Asked) -> str:
        """What stands under a picture, as in `Images.captions`."""
        return str(asked or "") if self.reads_text else self.pipeline.caption(asked)  # type: ignore[arg-type]

    def read_condition(self, asked: Asked) -> Any:
        """The value of the model's condition for one picture."""
        given = self.give([asked])
        return read_condition(self.pipeline, given.pop("labels", None), given, None)[0]


class Models:
    """Loads each model at its first use and keeps it."""

    def __init__(self, sources: Sequence[str] = (), *, dtype: str = "auto", device: str = "auto"):
        """`sources`: checkpoint folders, or names on the hub; without any, those of `DEFAULTS` that exist. `dtype` and
        `device`: as in `Pipeline.from_pretrained`. Nothing is loaded yet. UserError when there is no model."""
        self.sources = find_sources(sources)
        self._dtype, self._device = dtype, device
        self._loaded: dict[tuple[str, str], Model] = {}
        self._loading = threading.Lock()
        self._temporary = tempfile.TemporaryDirectory(prefix="nextscale-demo-")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._stopped: Callable[[], bool] = lambda: False

    def until(self, stopped: Callable[[], bool]) -> Models:
        """The same models and thread, for work that ends with `Stopped` once `stopped` is true: work that waits is not
        begun, and what has begun ends with its present piece."""
        one = copy.copy(self)
        one._stopped = stopped
        return one

    def load(self, source: str, dtype: str = "") -> Model:
        """A model by its folder or name, in `dtype` (default: that of the page).

        UserError as `Pipeline.from_pretrained` raises it, for a name that was not given at the start and is no folder,
        and for a model that takes neither classes nor a text. Not for work that `run` does: it would wait for itself.
        """
        source, key = source.strip(), (source.strip(), dtype or self._dtype)
        with self._loading:
            if key not in self._loaded:
                if source not in self.sources and not Path(source).is_dir():
                    raise UserError(f"there is no folder '{source}': give the folder of a model, as {DEFAULTS[0]}")
                self._loaded[key] = self.run(lambda: self._open(*key))
            return self._loaded[key]

    def _open(self, source: str, dtype: str) -> Model:
        folder = find_folder(source)
        config, origin = read_config(folder)
        if config.transformer is None:
            raise UserError(f"{source} is a tokenizer alone, which cannot sample: give a model with a transformer")
        condition = config.transformer.condition
        texts = sum(part.kind == "text" for part in condition.list_parts().values())
        if config.count_of_classes is None and texts != 1:
            raise UserError(
                f"{source} draws images from {condition.describe()}, and the page asks for classes or for one text"
            )
        return Model(source, folder, Pipeline.from_pretrained(folder, dtype=dtype, device=self._device), origin)

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, or its exception; done after the work that others asked for before. See `until`."""

        def begin() -> T:
            if self._stopped():
                raise Stopped
            return work()

        piece = self._worker.submit(begin)
        while not wait([piece], timeout=_SECONDS_BETWEEN_LOOKS).done:
            if self._stopped() and piece.cancel():
                raise Stopped
        return piece.result()

    def iterate(self, values: Iterator[T]) -> Iterator[T]:
        """The same values, each computed as `run` does: between them others have their turn."""
        end = object()
        while True:
            value = self.run(lambda: next(values, end))
            if value is end:
                return
            yield value  # type: ignore[misc]

    @property
    def folder(self) -> str:
        """A folder for uploads and pictures, which `close` deletes."""
        return self._temporary.name

    def close(self) -> None:
        """End the thread once its present work is done, and delete the folder."""
        self._worker.shutdown(cancel_futures=True)
        self._temporary.cleanup()


def find_sources(given: Sequence[str]) -> list[str]:
    """The models that are offered: those given, each once, else those of `DEFAULTS` that exist and can sample."""
    if given:
        return list(dict.fromkeys(given))
    found = [source for source in DEFAULTS if (Path(source) / "config.json").is_file()]
    found = [source for source in found if read_config(Path(source))[0].transformer is not None]
    if not found:
        raise UserError(
            f"there is no model here ({' and '.join(DEFAULTS)} do not exist): give the folder of one, `nextscale demo "
            "MODEL`, or train a small one in minutes with `nextscale quickstart`"
        )
    return found
