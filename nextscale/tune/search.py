"""Which combination of options is the cheapest that loses little: decided from measurements, without making any.

1. Screening: each option alone. Options that save no time are left out.
2. Combinations are ordered by what their options promise when speeds and distances multiply; the best go on.
3. Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): all are measured on a few images, the better half
   on more, and so on, down to the finalists.
4. The finalists are measured again, on other images and seeds and against the other half of the reference. The winner
   is the fastest whose loss is small enough there, by bounds that hold for all finalists at once (Bonferroni).

Better means a larger expected saving: the share of time saved, times the probability that the loss is small enough,
as for constrained optimisation (Gardner et al. 2014). Every decision is a function of the measurements and of the
seconds that they took, so a search that is resumed with stored measurements decides as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Protocol

from nextscale.common.errors import UserError
from nextscale.evaluation.metrics.paired import PairedLoss
from nextscale.tune.options import Candidate, Option

CONFIDENCE = 0.95
FINALISTS = 3
_SCREENING, _SELECTION = 0.25, 0.65
"""Shares of the time by which screening and the choice of the finalists end."""
_LARGEST = 16
"""Combinations at the start of successive halving."""
_ROUNDS = 5
"""Timed rounds that each step adds."""
_SAVES = 1.02
"""An option that is less than this many times as fast saves nothing worth a combination."""


class Measurer(Protocol):
    """Measures candidates beside the dense model. A measurement that was made is not made again."""

    shard: int
    """Images of one step."""

    @property
    def seconds(self) -> float:
        """Time of all measurements so far."""

    def check(self, candidate: Candidate) -> None:
        """UserError with the reason when the model refuses the settings, or its numbers are not finite with them."""

    def measure_speed(self, candidate: Candidate, rounds: int, held_out: bool = False) -> float:
        """How many times as fast as the dense model the candidate is: the median of so many rounds."""

    def measure_loss(self, candidate: Candidate, images: int, held_out: bool = False) -> PairedLoss:
        """The loss on the first so many images."""


@dataclass
class Result:
    """What is known of a candidate."""

    candidate: Candidate
    speed: float
    """Times as fast as the dense model."""
    loss: PairedLoss
    rung: int = 0
    """How often it was kept: 0 = screening."""
    held_out: PairedLoss | None = None
    held_out_speed: float = 0.0

    def expect_saving(self, max_loss: float) -> float:
        """The share of time saved, times the probability that the loss is at most `max_loss`."""
        return expect_saving(self.speed, self.loss.loss, self.loss.error, max_loss)


@dataclass
class Found:
    """The outcome of a search."""

    results: list[Result]
    """Of all candidates that were measured."""
    finalists: list[Result]
    """Fastest first."""
    winner: Result | None
    """None: no finalist is faster than the dense model with a loss that is small enough."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reason by candidate, where the model refuses the settings."""
    confidence: float = CONFIDENCE
    """Of each finalist's bound, so that all hold at once with CONFIDENCE."""


def expect_saving(speed: float, loss: float, error: float, max_loss: float) -> float:
    """Share of the time saved, times the probability that the loss is at most `max_loss`; below 0 what is slower."""
    chance = NormalDist().cdf((max_loss - loss) / error) if error > 0 else float(loss <= max_loss)
    saved = 1 - 1 / speed
    return saved * chance if saved > 0 else saved


class Search:
    """One search over options within a time."""

    def __init__(
        self, measurer: Measurer, max_loss: float, seconds: float, tell: Callable[[str], None] = lambda text: None
    ):
        """`tell` is called with one line of text after each measurement."""
        self.measurer, self.max_loss, self.limit, self.tell = measurer, max_loss, seconds, tell
        self.results: dict[str, Result] = {}
        self.refused: dict[str, str] = {}

    def run(self, options: Sequence[Option], combinations: Sequence[Candidate]) -> Found:
        """Search the combinations of these options."""
        singles = [Candidate((option,)) for option in options]
        measured = self._measure(singles, "one change", 0, _SCREENING * self.limit)
        candidates = self._choose_candidates(measured, combinations)
        rungs = max(1, math.ceil(math.log2(max(1, len(candidates)) / FINALISTS)))
        begun = self.measurer.seconds
        for rung in range(1, rungs + 1):
            until = begun + (_SELECTION * self.limit - begun) * rung / rungs
            results = self._measure(candidates, f"round {rung} of {rungs}", rung, until)
            kept = FINALISTS if rung == rungs else max(FINALISTS, math.ceil(len(results) / 2))
            candidates = [result.candidate for result in self._rank(results)[:kept]]
        finalists = [self.results[candidate.name] for candidate in candidates]
        return self._confirm([result for result in finalists if result.speed > 1])

    def _rank(self, results: Sequence[Result]) -> list[Result]:
        return sorted(results, key=lambda result: -result.expect_saving(self.max_loss))

    def _choose_candidates(self, singles: Sequence[Result], combinations: Sequence[Candidate]) -> list[Candidate]:
        """The combinations that promise the largest expected saving, as many as there is time for."""
        known = {result.candidate.name: result for result in singles if result.speed >= _SAVES}
        promises = []
        for candidate in combinations:
            parts = [known.get(option.name) for option in candidate.options]
            if all(parts):
                promises.append((predict_saving([p for p in parts if p], self.max_loss), candidate))
        promises.sort(key=lambda promise: -promise[0])
        return [candidate for _, candidate in promises[: self._count_affordable(singles)]]

    def _count_affordable(self, singles: Sequence[Result]) -> int:
        """With how many combinations successive halving can begin: its later rounds take as long as the first one."""
        steps = max((result.loss.images for result in singles), default=0) // self.measurer.shard
        if not steps or not self.measurer.seconds:
            return _LARGEST
        first_round = self.measurer.seconds / (len(singles) * steps) * (steps + 1)  # of one candidate
        left = _SELECTION * self.limit - self.measurer.seconds
        return max(FINALISTS, min(_LARGEST, int(left / (2 * first_round))))

    def _measure(self, candidates: Sequence[Candidate], stage: str, rung: int, until: float) -> list[Result]:
        """Measure all candidates on as many images each as there is time for until `until` seconds; one step at least.

        Candidates that the model refuses are left out.
        """
        left = [candidate for candidate in candidates if self._is_accepted(candidate)]
        images, rounds = max(map(self._count_images, left), default=0), _ROUNDS * max(1, rung)
        while left:
            begun, images = self.measurer.seconds, images + self.measurer.shard
            for number, candidate in enumerate(left, start=1):
                speed = self.measurer.measure_speed(candidate, rounds)
                loss = self.measurer.measure_loss(candidate, images)
                result = self.results.setdefault(candidate.name, Result(candidate, speed, loss))
                result.speed, result.loss, result.rung = speed, loss, rung
                self.tell(f"{stage}, {number} of {len(left)}, {describe(result.speed, loss)}: {candidate.name}")
            taken = self.measurer.seconds - begun
            if self.measurer.seconds + taken > until:
                break
        return [self.results[candidate.name] for candidate in left]

    def _is_accepted(self, candidate: Candidate) -> bool:
        """Whether the model takes the settings; keeps the reason where not."""
        try:
            self.measurer.check(candidate)
        except UserError as error:
            self.refused[candidate.name] = str(error)
        return candidate.name not in self.refused

    def _count_images(self, candidate: Candidate) -> int:
        result = self.results.get(candidate.name)
        return result.loss.images if result else 0

    def _confirm(self, finalists: list[Result]) -> Found:
        """Measure the finalists on held-out images until the time is up, and choose the winner."""
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(finalists))
        images, taken = 0, 0.0
        while finalists and (not images or self.measurer.seconds + taken <= self.limit):
            begun, images = self.measurer.seconds, images + self.measurer.shard
            for number, result in enumerate(finalists, start=1):
                result.held_out_speed = self.measurer.measure_speed(result.candidate, 2 * _ROUNDS, held_out=True)
                result.held_out = self.measurer.measure_loss(result.candidate, images, held_out=True)
                text = describe(result.held_out_speed, result.held_out)
                self.tell(f"held-out images, {number} of {len(finalists)}, {text}: {result.candidate.name}")
            taken = self.measurer.seconds - begun
        finalists.sort(key=lambda result: -result.held_out_speed)
        confirmed = [r for r in finalists if r.held_out and r.held_out.bound(confidence) <= self.max_loss]
        winner = next((result for result in confirmed if result.held_out_speed > 1), None)
        return Found(list(self.results.values()), finalists, winner, self.refused, confidence)


def predict_saving(parts: Sequence[Result], max_loss: float) -> float:
    """The expected saving of a combination, if the speeds and the distances of its options multiply."""
    speed = math.prod(part.speed for part in parts)
    loss = math.prod(1 + part.loss.loss for part in parts) - 1
    error = math.sqrt(sum(part.loss.error**2 for part in parts))
    return expect_saving(speed, loss, error, max_loss)


def describe(speed: float, loss: PairedLoss) -> str:
    """Speed and loss in words."""
    return f"{speed:.2f} times as fast, distance {loss.loss:+.1%} ± {loss.error:.1%} on {loss.images:,} images"
