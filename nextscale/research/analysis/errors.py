"""Errors of early scales: how wrong tokens at one scale change the image (MEPA, Fig. 1b).

Each image is sampled once without errors. Then, for each scale, tokens of that scale are replaced by random ones and
the later scales are sampled again with the same random numbers. Letters: B images, L tokens of all scales, K scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.common.devices import find_device
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.machine import describe_machine
from nextscale.common.pictures import to_pil
from nextscale.common.precision import widen
from nextscale.common.rng import make_generator
from nextscale.config.analysis import ErrorsConfig
from nextscale.config.parse import to_dict
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Labels, Pipeline
from nextscale.research.analysis.analyzed_model import check_distinct, choose_labels, choose_names, name_scales
from nextscale.research.analysis.figures import Row, plot_error_propagation, plot_image_rows
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
    labels: Labels = (),
) -> dict[str, Any]:
    """Inject errors at each scale; writes errors.json, errors.png (images after each scale) and distance.png to `out`.

    `labels`: classes of the images in turn, as `Pipeline.sample` takes them; empty = all classes. Returns the content
    of errors.json (docs/measuring.md). Raises UserError for a scale that does not exist, and for sampling settings
    under which the image is not determined by its tokens.
    """
    config, sampling = config or ErrorsConfig(), sampling or SampleConfig()
    if sampling.official_seeding or sampling.smooth or sampling.draft_scales or sampling.refiner:
        raise UserError("errors are injected into plain sampling: without official_seeding, smooth and a refiner")
    reports, image_panels, distance_panels = [], {}, {}
    for model, name in zip(models, check_distinct(choose_names(models, names)), strict=True):
        pipeline = Pipeline.from_pretrained(model, device=config.device)
        injection = _ErrorInjection(pipeline, config, sampling, _parse_scales(config, pipeline, name))
        values = pipeline.transformer.condition.parse(choose_labels(pipeline, labels, config.num))
        for start in range(0, config.num, config.batch_size):
            injection.add_batch(values[start : start + config.batch_size], start)
        reports.append({"name": name, **injection.report()})
        scales = reports[-1]["scales"]
        image_panels[name] = (scales, injection.rows)
        distance_panels[name] = (scales, reports[-1]["errors"], reports[-1]["another_image"])
    report = {
        "analysis": "errors", "images": config.num, "share": config.share, "sampling": to_dict(sampling),
        "machine": describe_machine(find_device(config.device)), "models": reports,
    }  # fmt: skip
    write_json(out / "errors.json", report)
    plot_image_rows(image_panels, out / "errors.png")
    plot_error_propagation(distance_panels, out / "distance.png")
    return report


def _parse_scales(config: ErrorsConfig, pipeline: Pipeline, name: str) -> list[int]:
    """The scales of the errors, counted from 0."""
    count = len(pipeline.config.pyramid)
    if wrong := [s for s in config.scales if not 1 <= s <= count]:
        raise UserError(f"{name} has scales 1 to {count}; there is no scale {wrong[0]}")
    return sorted({s - 1 for s in config.scales}) or list(range(max(count - 1, 1)))


@dataclass(frozen=True)
class _Trajectory:
    """A sampled batch: all tokens, and the canvas after each scale."""

    tokens_BL: Tensor
    canvases: list[Tensor]
    """(B, c, h, w) after each scale."""


@dataclass
class _Distances:
    """Distances of images with an error from the same images without it, one tensor per batch."""

    tokens: list[Tensor] = field(default_factory=list)
    """Share of each scale's tokens that differ, (B, K)."""
    canvas: list[Tensor] = field(default_factory=list)
    """Norm of the difference of the canvases after each scale, relative to the norm without the error, (B, K)."""
    image: list[Tensor] = field(default_factory=list)
    """Root mean squared difference of the pixels, which are in 0 to 1, (B,)."""

    def report(self) -> dict[str, Any]:
        image_B = widen(torch.cat(self.image))
        return {
            "tokens_changed": widen(torch.cat(self.tokens)).mean(dim=0).tolist(),
            "canvas_distance": widen(torch.cat(self.canvas)).mean(dim=0).tolist(),
            "image_distance": float(image_B.mean()),
            "image_distance_deviation": float(image_B.std(correction=1)) if len(image_B) > 1 else 0.0,
        }


class _ErrorInjection:
    """Samples one model with errors at each of these scales (from 0), and collects the distances."""

    def __init__(self, pipeline: Pipeline, config: ErrorsConfig, sampling: SampleConfig, scales: list[int]):
        self.pipeline, self.config, self.sampling, self.scales = pipeline, config, sampling, scales
        self.tokenizer, self.pyramid = pipeline.tokenizer, pipeline.config.pyramid
        self.errors = {s: _Distances() for s in scales}
        self.errors_alone = {s: _Distances() for s in scales}
        """With the later scales' tokens unchanged."""
        self.other_images = _Distances()
        """Between images of different seeds, for comparison."""
        self.rows: list[Row] = []
        """Rows of errors.png: the images after each scale, marked at the scale of the error."""

    @torch.no_grad()
    def add_batch(self, values: Tensor, first: int) -> None:
        """Sample a batch without errors and with each error. `first`: the number of its first image."""
        clean = self._sample(values, first)
        image = self._decode(clean.canvases[-1])
        shown = max(min(self.config.shown - first, len(values)), 0)
        rows = [self._make_rows(clean, shown, [self.pipeline.caption(int(v)) for v in values])]
        for s in self.scales:
            wrong_BL = self._corrupt_tokens(clean.tokens_BL, s, first)
            up_to_L = torch.arange(self.pyramid.length, device=wrong_BL.device) < self.pyramid.spans[s][1]
            resampled = self._sample(values, first, Edit(wrong_BL, up_to_L.expand_as(wrong_BL)))
            self._add_distances(self.errors[s], clean, image, resampled)
            unchanged = _Trajectory(wrong_BL, list(self.tokenizer.build_canvases(wrong_BL)))
            self._add_distances(self.errors_alone[s], clean, image, unchanged)
            rows.append(self._make_rows(resampled, shown, [f"error at {name_scales(self.pyramid)[s]}"] * shown, s))
        self._add_distances(self.other_images, clean, image, self._sample(values, first + self.config.num))
        self.rows += [row for image_rows in zip(*rows, strict=True) for row in image_rows]

    def _sample(self, values: Tensor, first: int, edit: Edit | None = None) -> _Trajectory:
        sampler = build_sampler(
            self.tokenizer, self.pipeline.transformer, values, self.sampling, first_image=first, edit=edit
        )
        done = [(step.tokens_BN, step.canvas_BChw) for step in check_finite(sample_scales(sampler))]
        return _Trajectory(torch.cat([tokens for tokens, _ in done], dim=1), [canvas for _, canvas in done])

    def _corrupt_tokens(self, tokens_BL: Tensor, s: int, first: int) -> Tensor:
        """The tokens with an error at scale s. The error of an image does not depend on its batch."""
        (start, end), codes = self.pyramid.spans[s], self.tokenizer.config.vocab_size
        count = max(1, round(self.config.share * (end - start)))
        wrong_BL = tokens_BL.clone()
        for b in range(len(tokens_BL)):
            rng = make_generator(self.sampling.seed, "error", first + b, s)
            cells = start + torch.randperm(end - start, generator=rng)[:count].to(tokens_BL.device)
            shift = torch.randint(1, codes, (count,), generator=rng).to(tokens_BL.device)
            wrong_BL[b, cells] = (tokens_BL[b, cells] + shift) % codes
        return wrong_BL

    def _add_distances(
        self, distances: _Distances, clean: _Trajectory, image_B3HW: Tensor, changed: _Trajectory
    ) -> None:
        changed_BL = (changed.tokens_BL != clean.tokens_BL).float()
        distances.tokens.append(
            torch.stack([changed_BL[:, i:j].mean(dim=1) for i, j in self.pyramid.spans], dim=1).cpu()
        )
        canvas_distances = [
            (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-12)
            for a, b in zip(changed.canvases, clean.canvases, strict=True)
        ]
        distances.canvas.append(torch.stack(canvas_distances, dim=1).cpu())
        changed_B3HW = self._decode(changed.canvases[-1])
        distances.image.append((changed_B3HW - image_B3HW).square().flatten(1).mean(dim=1).sqrt().cpu())

    def _decode(self, canvas_BChw: Tensor) -> Tensor:
        return (self.tokenizer.decode_canvas(canvas_BChw) + 1) / 2

    def _make_rows(
        self, trajectory: _Trajectory, shown: int, captions: list[str], error: int | None = None
    ) -> list[Row]:
        """For each of the first `shown` images a row of pictures: the image after each scale."""
        if not shown:
            return []
        columns = [to_pil(self._decode(canvas[:shown])) for canvas in trajectory.canvases]
        return [(captions[b], [column[b] for column in columns], error) for b in range(shown)]

    def report(self) -> dict[str, Any]:
        """Mean distances as JSON values: with each error, and between images of different seeds.

        `kept_image_distance`: the effect of the error alone, with the later scales' tokens unchanged.
        """
        errors = []
        for s in self.scales:
            alone = self.errors_alone[s].report()["image_distance"]
            errors.append({"scale": s + 1, **self.errors[s].report(), "kept_image_distance": alone})
        return {"scales": name_scales(self.pyramid), "errors": errors, "another_image": self.other_images.report()}
