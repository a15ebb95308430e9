"""`nextscale tune`: searches the settings of a model, writes the results and the winner's profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from nextscale.checkpoints.native import read_config
from nextscale.common.dtypes import SamplingDtype
from nextscale.common.errors import Interruption, UserError
from nextscale.common.fingerprint import fingerprint_path
from nextscale.common.machine import describe_machine
from nextscale.config.condition import OTHERS
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.files import record_settings
from nextscale.config.parse import to_dict
from nextscale.config.profile import Measured, make_profile, write_profile
from nextscale.config.sampling import SampleConfig
from nextscale.config.tune import TuneConfig, check_base
from nextscale.data.given import ImageConditions
from nextscale.encoders.load import load_feature_network
from nextscale.evaluation.compute import name_metric
from nextscale.evaluation.images import MeasuredImages, ModelImages, check_columns, open_images
from nextscale.evaluation.reference import read_npz
from nextscale.sampling.guidance import schedule_guidance
from nextscale.sampling.thresholds import read_budgets
from nextscale.tune.measure import ModelMeasurer
from nextscale.tune.options import choose_base, combine_options, list_options
from nextscale.tune.report import build_report, draw_samples, write_report
from nextscale.tune.search import Found, Search

RECORD = "tune.json"
_LEAST_BUDGET = 0.5
"""Share of the dense FLOPs below which calibrated thresholds are not tried."""


def tune(
    model: Path, network: str, reference: str, out: Path, config: TuneConfig, device: torch.device,
    *, name: str = "fast", command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Find the fastest settings of a model whose Fréchet distance is at most `config.max_loss` larger.

    Writes results.json, table.md, pareto.png and samples.png to `out`, and the profile `name` into the model's folder
    where a setting was confirmed on held-out images; returns the content of results.json. `command`: as typed, for the
    report. A stopped search goes on with what was measured. UserError for inputs that cannot be measured or that are
    not those of the folder; Interruption on Ctrl-C.
    """
    check_base(config.sampling)
    architecture, origin = read_config(model)
    if architecture.transformer is None:
        raise UserError(f"{model} is a tokenizer alone, which cannot sample: give a model with a transformer")
    if config.clock == "processor" and device.type != "cpu":
        raise UserError(f"clock processor counts the work of a CPU; the model is on {device}: use wall")
    settings = choose_base(architecture, replace(config.sampling, refiner=""))
    eye = load_feature_network(network)
    eye = eye.to(device) if isinstance(eye, torch.nn.Module) else eye
    images = _open_reference(reference, architecture.image_size, config)
    given = None
    if architecture.transformer.condition.kind in OTHERS:
        given = ImageConditions(reference, str(model), architecture, config.images)
    machine = describe_machine(device)
    features = {"where": network, "weights": eye.fingerprint()}
    inputs = {"model": fingerprint_path(model), "features": features, "reference": images.identity()}
    _record(out, config, inputs | ({"given by": given.identity()} if given else {}), machine)
    strengths = schedule_guidance(settings, architecture.pyramid)
    budgets = [row.share for row in read_budgets(origin) if _LEAST_BUDGET <= row.share < 1]
    options = list_options(architecture, strengths, config.sampling, budgets)
    combinations = combine_options(options, settings)
    tqdm.write(f"{len(options)} options, {len(combinations)} combinations; measured for {_format_time(config.seconds)}")
    with _report_interruption(out):
        measurer = ModelMeasurer(str(model), eye, images, settings, config, out, device, given)
        search = Search(measurer, config.max_loss, config.seconds, _Progress(measurer, config.seconds))
        found = search.run(options, combinations)
        if not found.results:
            raise UserError(f"no setting can be measured: {'; '.join(set(found.refused.values()))}")
        facts = {
            "model": str(model), "features": network, "reference": reference, "command": command, "machine": machine,
            "batch": config.batch, "clock": config.clock, "max_loss": config.max_loss, "time": config.seconds,
            "sampling": to_dict(settings),
        }  # fmt: skip
        metric = name_metric("distance", eye.name)
        report = build_report(found, measurer, metric, facts)
        write_report(report, out)
        draw_samples(measurer, found.finalists, out / "samples.png")
    if found.winner is not None:
        _write_profile(found, measurer, metric, model, name, machine)
    return report


def _record(out: Path, config: TuneConfig, inputs: dict[str, Any], machine: dict[str, Any]) -> None:
    """Write what the measurements in `out` are of; UserError when they are of something else.

    Time and largest loss may change: they decide what is measured, not what is found.
    """
    refiner = config.sampling.refiner
    inputs["refiner"] = fingerprint_path(refiner) if refiner else None
    inputs["machine"] = {key: machine[key] for key in ("device", "threads", "torch")}
    settings = {"sampling": to_dict(config.sampling), "batch": config.batch, "shard": config.shard}
    record_settings(out / RECORD, {**settings, "clock": config.clock}, inputs)


def _open_reference(reference: str, size: tuple[int, int], config: TuneConfig) -> MeasuredImages:
    """The images of the reference. UserError for statistics, which cannot be divided into halves."""
    if reference.endswith(".npz") and not read_npz(Path(reference)).has_samples:
        raise UserError(
            f"{reference} holds statistics or features: tune divides the reference into two halves, give its images"
        )
    batch = EvaluationConfig().batch
    images = open_images(reference, 0, size, SampleConfig(), batch, reading=config.images)
    if isinstance(images, ModelImages):
        raise UserError(f"--reference {reference} is a model: give images")
    check_columns([images])
    if len(images) < 4:
        raise UserError(f"{reference} has {len(images)} images: tune divides the reference into two halves")
    return images


class _Progress:
    """Prints each measurement with the time that is used and the time that is given."""

    def __init__(self, measurer: ModelMeasurer, seconds: float):
        self.measurer, self.limit = measurer, seconds

    def __call__(self, text: str) -> None:
        tqdm.write(f"[{_format_time(self.measurer.seconds)} of {_format_time(self.limit)}] {text}")


def _format_time(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def _report_interruption(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interruption(
            f"interrupted; what was measured is kept in {folder}; the same command goes on from there"
        ) from None


def _write_profile(
    found: Found, measurer: ModelMeasurer, metric: str, model: Path, name: str, machine: dict[str, Any]
) -> None:
    """Write the winner as a profile."""
    winner = found.winner
    assert winner is not None, "called with a winner"
    assert winner.held_out is not None, "a winner was measured on held-out images"
    _, seconds = measurer.list_seconds(winner.candidate, held_out=True)
    measured = Measured(
        times_as_fast=winner.held_out_speed, seconds_per_image=seconds, batch=measurer.config.batch, metric=metric,
        loss=winner.held_out.loss, loss_at_most=winner.held_out.bound(), images=winner.held_out.images, machine=machine,
    )  # fmt: skip
    settings = winner.candidate.change(measurer.base)
    write_profile(model, name, make_profile(model, cast(SamplingDtype, winner.candidate.dtype), settings, measured))


def format_report(report: dict[str, Any], out: Path, name: str) -> str:
    """The outcome in a few lines."""
    lines = []
    finalists = sorted((row for row in report["rows"] if "finalist" in row), key=lambda row: row["finalist"])
    for row in finalists:
        held = row["held_out"]
        loss = f"{report['metric']} {held['loss']:+.1%}, at most {held['loss_at_most_of_all_finalists']:+.1%}"
        lines.append(f"{row['finalist']}  {held['times_as_fast']:.2f} times as fast, {loss}: {row['name']}")
    if report["winner"] is None:
        lines.append(
            f"no setting is faster with a {report['metric']} at most {report['max_loss']:.1%} larger, as far as "
            "this many images can show: no profile was written; give more --time or another --max-loss"
        )
    else:
        lines.append(f"wrote the profile: nextscale sample {report['model']} --profile {name}")
    return "\n".join([*lines, f"see {out}/table.md, pareto.png, samples.png, results.json"])
