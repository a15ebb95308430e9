"""What a check of `nextscale doctor` finds, and how it is printed. Needs no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

_WIDTH = 88
Status = Literal["pass", "slow", "fail", "skip"]
"""pass: as it should be. slow: results are right, a faster way is not in use. fail: something does not work or gives
wrong results. skip: not checked here, or a part that is not installed."""


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    name: str
    status: Status
    found: str
    """What was found, in one line."""
    advice: str = ""
    """What to do about it; empty when there is nothing to do."""
    values: dict[str, Any] = field(default_factory=dict)
    """Measured values, for --json."""

    def format(self) -> str:
        """The line as it is printed, with the advice below it."""
        lines = textwrap.wrap(self.found, _WIDTH) or [""]
        if self.advice:
            lines += textwrap.wrap(f"-> {self.advice}", _WIDTH)
        return f"{self.status:<5} {self.name:<24} " + f"\n{'':<31}".join(lines)


Check = Callable[[], Iterator[Result]]
"""A check yields one result or several. What it raises becomes a result with the status fail."""


def run_check(name: str, check: Check) -> Iterator[Result]:
    """The results of a check; an exception becomes one that fails."""
    try:
        yield from check()
    except Exception as error:  # a check must not keep the others from running
        what = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        yield Result(name, "fail", what, "this should work on every machine: report it with the whole output")


def count_status(results: list[Result]) -> dict[Status, int]:
    """How many results have each status."""
    kinds: tuple[Status, ...] = ("pass", "slow", "fail", "skip")
    return {kind: sum(result.status == kind for result in results) for kind in kinds}
