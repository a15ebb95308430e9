"""Notes to the user: one line each, and few of a kind where many files have the same fault."""

from __future__ import annotations

from collections import Counter

_LIMIT = 3
_printed: set[str] = set()
_counts: Counter[str] = Counter()


def print_note(kind: str, text: str) -> None:
    """Print `note: text`, once. Of one kind the first three of a process are printed, and that there are more."""
    from tqdm import tqdm

    if text in _printed or _counts[kind] > _LIMIT:
        return
    _printed.add(text)
    _counts[kind] += 1
    if _counts[kind] <= _LIMIT:
        tqdm.write(f"note: {text}")
    else:
        tqdm.write("note: there are more such files; they are not named")
