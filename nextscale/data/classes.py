"""Where the classes of a data set meet those of something trained: a model, a classifier, a run, another data set.

Labels are positions in a list of names. Two lists are compared by their names, and labels are mapped from one order to
the other:

- equal names in any order are matched by name (case, spaces and Unicode form may differ where that leaves no doubt);
- where the names of a side are unknown or are all numbers, classes are matched by number, and a note says so: the
  class `3` is the fourth of the other side's names;
- one class on both sides is one class, whatever its name; a note names both;
- anything else is refused, with what each side lacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.reading import read_json
from nextscale.config.classes import fold_name, is_number, list_names
from nextscale.config.data import DataConfig
from nextscale.config.model import ModelConfig
from nextscale.data.cache import CachedExamples, open_examples
from nextscale.data.captions import TextInput
from nextscale.data.datasets import ImageExamples, ImageSet
from nextscale.data.examples import Examples
from nextscale.tokenizer.tokenizer import Tokenizer

Labelled = TypeVar("Labelled", bound=Examples | ImageSet)


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or of something trained."""

    where: str
    """What messages call it."""
    names: tuple[str, ...]
    """In label order; empty when unknown."""
    count: int

    @staticmethod
    def of_data(where: str, names: Sequence[str]) -> Classes:
        """Those of a data set, which always have names."""
        return Classes(where, tuple(names), len(names))

    @staticmethod
    def of_model(where: str, config: ModelConfig) -> Classes:
        """Those of a generator."""
        assert config.transformer is not None, "a tokenizer alone has no classes"
        condition = config.transformer.condition
        return Classes(where, config.class_names, condition.count_of_classes or condition.num_classes)

    @property
    def unnamed(self) -> bool:
        """Whether the names are unknown or are numbers."""
        return all(map(is_number, self.names))

    def describe(self) -> str:
        """The names, or how many there are."""
        return list_names(self.names) if self.names else f"{self.count} classes without names"


@dataclass(frozen=True)
class ClassMatch:
    """Which class of the other side each class of a data set is."""

    index: tuple[int, ...]
    """For each label of the data the label of the other side."""
    names: tuple[str, ...]
    """Class names in the order of the other side: its own, or those of the data where it has none."""
    note: str = ""
    """What the user should know; empty where names were equal."""

    @property
    def unchanged(self) -> bool:
        """Whether labels stay as they are."""
        return self.index == tuple(range(len(self.index)))

    def map_labels(self, labels: Tensor) -> Tensor:
        """Labels of the data, int64 of any shape, as labels of the other side."""
        return labels if self.unchanged else torch.tensor(self.index, device=labels.device)[labels]

    def print_note(self) -> None:
        """Print the note, if there is one."""
        if self.note:
            print(f"note: {self.note}")


def read_trained_classes(folder: Path) -> Classes | None:
    """The classes of the model that a run wrote to its folder; None where it has written none with a training state."""
    if not (folder / "config.json").is_file() or not any((folder / "training").glob("*.pt")):
        return None
    head = read_json(folder / "config.json")
    head = head.get("model", head) if isinstance(head, dict) else {}
    names = head.get("class_names") if isinstance(head, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return Classes(str(folder), tuple(names), len(names))


def match_classes(data: Classes, known: Classes, *, subset: bool = False) -> ClassMatch:
    """Match the classes of `data` with those of something trained, `known`, by the rules above.

    `subset`: `data` may lack classes. Raises UserError naming the classes that each side lacks.
    """
    if data.names == known.names and data.count == known.count:
        return _create_match(range(data.count), data, known)
    if data.count == known.count == 1:
        named = bool(data.names and known.names) and fold_name(data.names[0]) != fold_name(known.names[0])
        note = f"the one class of {data.where}, {data.describe()}, is taken for {known.describe()} of {known.where}"
        return _create_match((0,), data, known, note if named else "")
    if subset or data.count == known.count:
        index = _match_names(data.names, known.names)
        if index is not None:
            return _create_match(index, data, known)
        index = _match_numbers(data, known, subset)
        if index is not None:
            return _create_match(index, data, known, _describe_numbers(data, known, index))
    raise UserError(_describe_difference(data, known))


def _create_match(index: Sequence[int], data: Classes, known: Classes, note: str = "") -> ClassMatch:
    names = known.names
    if known.unnamed and not data.unnamed and data.count == known.count:
        names = tuple(name for _, name in sorted(zip(index, data.names, strict=True)))
    return ClassMatch(tuple(index), names, note)


def _match_names(data: Sequence[str], known: Sequence[str]) -> tuple[int, ...] | None:
    """For each name of `data` the position in `known`; None unless every name is there, exactly once on each side."""
    for form in (str, fold_name):
        ours, theirs = [form(name) for name in data], [form(name) for name in known]
        counts, position = Counter(theirs), {name: i for i, name in enumerate(theirs)}
        if ours and len({*ours}) == len(ours) and all(counts[name] == 1 for name in ours):
            return tuple(position[name] for name in ours)
    return None


def _list_numbers(classes: Classes) -> list[int] | None:
    """The number of each class: its name where all are numbers, else its position; None where only some are numbers."""
    are_numbers = [is_number(name) for name in classes.names]
    if classes.names and all(are_numbers):
        return [int(name) for name in classes.names]
    return None if any(are_numbers) else list(range(classes.count))


def _match_numbers(data: Classes, known: Classes, subset: bool) -> tuple[int, ...] | None:
    """For each class of `data` the class of `known` that has its number; None unless one side has numbers only."""
    ours, theirs = _list_numbers(data), _list_numbers(known)
    if ours is None or theirs is None or not (data.unnamed or known.unnamed):
        return None
    if subset and data.count != known.count and not (data.names and data.unnamed):
        return None  # positions in a list of some classes are not those in the list of all
    position = {number: i for i, number in enumerate(theirs)}
    if len({*ours}) < len(ours) or not {*ours} <= position.keys():
        return None
    return tuple(position[number] for number in ours)


def _describe_numbers(data: Classes, known: Classes, index: Sequence[int]) -> str:
    """The note for classes that were matched by number; nothing where neither side has names."""
    if data.unnamed and known.unnamed:
        return ""
    names = [data.names[i] if data.names else str(i) for i in range(data.count)]
    pairs = [f"{name} = {known.names[j] if known.names else j}" for name, j in zip(names, index, strict=True)]
    where = data.where if data.unnamed else known.where
    return (
        f"{where} has no class names, only numbers: the classes of {data.where} are taken for those of {known.where} "
        f"by number, {list_names(pairs, 4)}"
    )


def _describe_difference(data: Classes, known: Classes) -> str:
    """What each side lacks, for the message that refuses the data."""
    message = f"{data.where} and {known.where} do not have the same classes"
    if not (data.names and known.names):
        return f"{message}: {data.where} has {data.describe()}; {known.where} has {known.describe()}"
    ours, theirs = {*map(fold_name, data.names)}, {*map(fold_name, known.names)}
    only = [
        (here.where, [name for name in here.names if fold_name(name) not in there])
        for here, there in ((data, theirs), (known, ours))
    ]
    parts = [f"only {where} has {list_names(names)}" for where, names in only if names]
    if not parts:
        return f"{message}: a name occurs more than once, and the order differs ({data.describe()}; {known.describe()})"
    return f"{message}: {'; '.join(parts)} (of {data.count} and {known.count})"


def relabel(examples: Labelled, match: ClassMatch) -> Labelled:
    """The images or examples with labels of the other side; nothing else changes."""
    if match.unchanged:
        return examples
    changed: Any
    if isinstance(examples, ImageSet | ImageExamples):
        changed = replace(examples, labels_B=match.map_labels(examples.labels_B))
    else:
        assert isinstance(examples, CachedExamples), "open_examples gives images or a cache"
        changed = examples.relabel(torch.tensor(match.index))
    return changed


def open_matched_examples(
    data: str, known: Classes, model: ModelConfig, tokenizer: Tokenizer, config: DataConfig, seed: int
) -> tuple[Examples, Examples, ClassMatch]:
    """(training, held-out) examples as `open_examples` gives them, with the labels of `known`, and the match.

    Raises UserError as `open_examples`, and when the classes do not match. For a model without classes in its condition
    labels stay as they are.
    """
    text = None if model.transformer is None else TextInput.of_condition(model.transformer.condition)
    train, held_out, names = open_examples(data, model, tokenizer, config, seed, text)
    if model.transformer is not None and not model.transformer.condition.takes_labels:
        return train, held_out, ClassMatch(tuple(range(len(names))), ())
    match = match_classes(Classes.of_data(data, names), known)
    return relabel(train, match), relabel(held_out, match), match


def match_model_classes(config: ModelConfig, other: ModelConfig, where: str) -> Tensor | None:
    """For each label of a model, and for "no label" after them, that of another model, `where`; None where all equal.

    Raises UserError when the models have different classes.
    """
    assert config.transformer is not None, "a tokenizer alone has no classes"
    if not config.transformer.condition.takes_labels:
        return None
    match = match_classes(Classes.of_model("this model", config), Classes.of_model(where, other))
    if not match.unchanged and config.transformer.condition.kind == "combined":
        raise UserError(f"{where} must have the classes of a combined condition in the same order as this model")
    return None if match.unchanged else torch.tensor([*match.index, len(match.index)])
