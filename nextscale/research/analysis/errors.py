"""Errors of early scales: what becomes of an image when tokens of one scale are wrong (MEPA, Fig. 1b).

Each image is drawn once undisturbed, and once for each scale of the error with tokens of that scale replaced by random
others and the later scales drawn on, with the same randomness. Letters: B images, L tokens of all scales, K scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.common.pictures import to_pil
from nextscale.common.rng import make_generator
from nextscale.config.analysis import ErrorsConfig
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.figures import image_rows, propagation
from nextscale.research.analysis.subject import distinct, scale_names, titles
from nextscale.sampling import build_sampler
from nextscale.sampling.editing import Edit
from nextscale.sampling.sampler import check_finite, sample_scales


def analyse_errors(
    models: Sequence[str],
    out: Path,
    config: ErrorsConfig | None = None,
    sampling: SampleConfig | None = None,
    names: Sequence[str] = (),
    *,
    labels: Sequence[int | str | None] = (),
) -> dict[str, Any]:
    """Disturb one scale after the other; writes errors.json, errors.png (images growing) and distance.png into `out`.

    `labels`: classes of the images in turn; none = all of them. Returns what errors.json holds (docs/measuring.md).
    Raises UserError for a scale that is not there, and for sampling settings under which tokens alone do not decide an
    image.
    """
    config, sampling = config or ErrorsConfig(), sampling or SampleConfig()
    if sampling.official_seeding or sampling.smooth or sampling.draft_scales or sampling.refiner:
        raise UserError("errors are injected into plain sampling: without official_seeding, smooth and a refiner")
    found, growing, far = [], {}, {}
    for model, name in zip(models, distinct(titles(models, names)), strict=True):
        pipeline = Pipeline.from_pretrained(model, device=config.device)
        lab = _Lab(pipeline, config, sampling, _scales(config, pipeline, name))
        values = _values(pipeline, labels, config.num)
        for start in range(0, config.num, config.batch_size):
            lab.disturb(values[start : start + config.batch_size], start)
        found.append({"name": name, **lab.report()})
        columns = found[-1]["scales"]
        growing[name] = (columns, lab.rows)
        far[name] = (columns, found[-1]["errors"], found[-1]["another_image"])
    report = {
        "analysis": "errors", "images": config.num, "share": config.share, "sampling": to_dict(sampling),
        "machine": describe_machine(torch.device(config.device)), "models": found,
    }  # fmt: skip
    write_json(out / "errors.json", report)
    image_rows(growing, out / "errors.png")
    propagation(far, out / "distance.png")
    return report


def _scales(config: ErrorsConfig, pipeline: Pipeline, name: str) -> list[int]:
    """The scales to disturb, counted from 0."""
    count = len(pipeline.config.pyramid)
    if wrong := [s for s in config.scales if not 1 <= s <= count]:
        raise UserError(f"{name} has scales 1 to {count}; there is no scale {wrong[0]}")
    return sorted({s - 1 for s in config.scales}) or list(range(max(count - 1, 1)))


def _values(pipeline: Pipeline, labels: Sequence[int | str | None], count: int) -> Tensor:
    """The condition of each image: these labels in turn, or all classes."""
    chosen = pipeline.label_indices(labels) or list(range(pipeline.transformer.config.condition.num_classes))
    return pipeline.transformer.condition.parse([chosen[i % len(chosen)] for i in range(count)])


@dataclass(frozen=True)
class _Drawn:
    """A batch of images as they grew."""

    tokens_BL: Tensor
    canvases: list[Tensor]
    """(B, c, h, w) after each scale."""


@dataclass
class _Distances:
    """How far images are from their undisturbed selves, one entry for each."""

    tokens: list[Tensor] = field(default_factory=list)
    """Share of each scale's tokens that differ, (B, K)."""
    canvas: list[Tensor] = field(default_factory=list)
    """Norm of the difference of the canvases after each scale over the undisturbed one's norm, (B, K)."""
    image: list[Tensor] = field(default_factory=list)
    """Root mean square over the pixels, in 0 to 1, (B,)."""

    def report(self) -> dict[str, Any]:
        image_B = torch.cat(self.image).double()
        return {
            "tokens_changed": torch.cat(self.tokens).double().mean(dim=0).tolist(),
            "canvas_distance": torch.cat(self.canvas).double().mean(dim=0).tolist(),
            "image_distance": float(image_B.mean()),
            "image_distance_deviation": float(image_B.std(correction=1)) if len(image_B) > 1 else 0.0,
        }


class _Lab:
    """One model under errors at these scales (from 0)."""

    def __init__(self, pipeline: Pipeline, config: ErrorsConfig, sampling: SampleConfig, scales: list[int]):
        self.pipeline, self.config, self.sampling, self.scales = pipeline, config, sampling, scales
        self.tokenizer, self.pyramid = pipeline.tokenizer, pipeline.config.pyramid
        self.errors = {s: _Distances() for s in scales}
        self.kept = {s: _Distances() for s in scales}
        self.another = _Distances()
        self.rows: list[tuple[str, list[Any], int | None]] = []
        """Of the pictures: what they are, the image after each scale, and where the error is."""

    @torch.no_grad()
    def disturb(self, values: Tensor, first: int) -> None:
        """Draw a batch, whose first image has this number, undisturbed and with each error."""
        clean = self._draw(values, first)
        image = self._painted(clean.canvases[-1])
        shown = max(min(self.config.shown - first, len(values)), 0)
        rows = [self._grown(clean, shown, [self.pipeline.caption(int(v)) for v in values])]
        for s in self.scales:
            wrong_BL = self._wrong(clean.tokens_BL, s, first)
            up_to_L = torch.arange(self.pyramid.length, device=wrong_BL.device) < self.pyramid.spans[s][1]
            drawn = self._draw(values, first, Edit(wrong_BL, up_to_L.expand_as(wrong_BL)))
            self._compare(self.errors[s], clean, image, drawn)
            self._compare(self.kept[s], clean, image, _Drawn(wrong_BL, list(self.tokenizer.build_canvases(wrong_BL))))
            rows.append(self._grown(drawn, shown, [f"error at {scale_names(self.pyramid)[s]}"] * shown, s))
        self._compare(self.another, clean, image, self._draw(values, first + self.config.num))
        self.rows += [row for of_image in zip(*rows, strict=True) for row in of_image]

    def _draw(self, values: Tensor, first: int, edit: Edit | None = None) -> _Drawn:
        sampler = build_sampler(
            self.tokenizer, self.pipeline.transformer, values, self.sampling, first_image=first, edit=edit
        )
        done = [(step.tokens_BN, step.canvas_BChw) for step in check_finite(sample_scales(sampler))]
        return _Drawn(torch.cat([tokens for tokens, _ in done], dim=1), [canvas for _, canvas in done])

    def _wrong(self, tokens_BL: Tensor, s: int, first: int) -> Tensor:
        """The tokens with an error at scale s. An image's error is its own, whatever shares its batch."""
        (start, end), codes = self.pyramid.spans[s], self.tokenizer.config.vocab_size
        count = max(1, round(self.config.share * (end - start)))
        wrong_BL = tokens_BL.clone()
        for b in range(len(tokens_BL)):
            rng = make_generator(self.sampling.seed, "error", first + b, s)
            cells = start + torch.randperm(end - start, generator=rng)[:count].to(tokens_BL.device)
            shift = torch.randint(1, codes, (count,), generator=rng).to(tokens_BL.device)
            wrong_BL[b, cells] = (tokens_BL[b, cells] + shift) % codes
        return wrong_BL

    def _compare(self, distances: _Distances, clean: _Drawn, image_B3HW: Tensor, drawn: _Drawn) -> None:
        changed_BL = (drawn.tokens_BL != clean.tokens_BL).float()
        distances.tokens.append(
            torch.stack([changed_BL[:, i:j].mean(dim=1) for i, j in self.pyramid.spans], dim=1).cpu()
        )
        far = [
            (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-12)
            for a, b in zip(drawn.canvases, clean.canvases, strict=True)
        ]
        distances.canvas.append(torch.stack(far, dim=1).cpu())
        painted = self._painted(drawn.canvases[-1])
        distances.image.append((painted - image_B3HW).square().flatten(1).mean(dim=1).sqrt().cpu())

    def _painted(self, canvas_BChw: Tensor) -> Tensor:
        return (self.tokenizer.decode_canvas(canvas_BChw) + 1) / 2

    def _grown(
        self, drawn: _Drawn, shown: int, captions: list[str], error: int | None = None
    ) -> list[tuple[str, list[Any], int | None]]:
        """A row of pictures for each of the first images."""
        if not shown:
            return []
        columns = [to_pil(self._painted(canvas[:shown])) for canvas in drawn.canvases]
        return [(captions[b], [column[b] for column in columns], error) for b in range(shown)]

    def report(self) -> dict[str, Any]:
        """Distances as JSON values, means over the images: with each error, and between images of other randomness.

        `kept_image_distance`: when the later scales keep the undisturbed tokens, what the error does by itself.
        """
        errors = [
            {"scale": s + 1, **self.errors[s].report(), "kept_image_distance": self.kept[s].report()["image_distance"]}
            for s in self.scales
        ]
        return {"scales": scale_names(self.pyramid), "errors": errors, "another_image": self.another.report()}
