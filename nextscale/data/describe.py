"""What a data set holds, in a few lines that are printed before work begins: classes, counts, what is not used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextscale.common.distributed import is_main_process
from nextscale.config.classes import is_number, list_names

_SHOWN, _FIRST = 20, 5


def print_data_set(names: Sequence[str], parts: Sequence[Tensor], notes: Sequence[str] = ()) -> None:
    """Print the classes with their counts, and the notes. Only the first process of a run prints.

    `parts`: labels of all images, or of the training and of the held-out images.
    """
    if is_main_process():
        print(format_classes(names, parts))
        for note in [*notes, *list_doubts(names, parts[0])]:
            print(f"note: {note}")


def format_classes(names: Sequence[str], parts: Sequence[Tensor]) -> str:
    """One line: number, name and count of each class; of many classes the first ones, the smallest and the largest."""
    counts = [torch.bincount(labels, minlength=len(names)).tolist() for labels in parts]
    texts = [
        f"{number} {name}: {' + '.join(str(part[number]) for part in counts)}" for number, name in enumerate(names)
    ]
    shares = " (training + held-out images)" if len(parts) > 1 else " (images)"
    head = f"{len(names)} {'class' if len(names) == 1 else 'classes'}{shares}: "
    if len(names) <= _SHOWN:
        return head + "; ".join(texts)
    smallest, largest = (choose(range(len(names)), key=counts[0].__getitem__) for choose in (min, max))
    return head + "; ".join(
        [*texts[:_FIRST], "...", texts[-1], f"smallest: {texts[smallest]}", f"largest: {texts[largest]}"]
    )


def list_doubts(names: Sequence[str], labels: Tensor) -> list[str]:
    """What is odd about the classes, a line each."""
    notes = []
    if len(names) > 1 and all(map(is_number, names)):
        differing = next((i for i, name in enumerate(names) if int(name) != i), None)
        if differing is not None:
            notes.append(
                f"the names of the classes are numbers, but not the numbers of the classes: class {differing} is named "
                f"{names[differing]}"
            )
    folded: dict[str, str] = {}
    others = {name: folded.setdefault(name.strip().casefold(), name) for name in names}
    alike = [f"{other} and {name}" for name, other in others.items() if other != name]
    if alike:
        notes.append(f"some classes differ only in case or spaces: {list_names(alike)}")
    absent = sorted(set(range(len(names))) - set(labels.unique().tolist()))
    if absent:
        notes.append(f"there are no images of {list_names(names[i] for i in absent)} to learn from or to measure")
    return notes
