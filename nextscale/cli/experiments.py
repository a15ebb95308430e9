"""Commands that list, show and run experiments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from nextscale.cli.files import Paths, list_inputs
from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from nextscale.config.tune import parse_duration

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output

Scale = Literal["tiny", "cifar", "paper"]


@dataclass
class ExperimentList:
    """List the experiments: tables and figures that one command makes."""

    def run(self) -> None:
        from nextscale.research.experiments.entry import list_experiments, read_entry

        for name in list_experiments():
            entry = read_entry(name)
            print(f"{name:<20}{entry['title']}: {entry['source']}")


@dataclass
class ExperimentShow:
    """Show an experiment: its rows, published figures, what it measures, needs and costs."""

    name: Positional[str]
    """As `nextscale experiment list` shows it."""
    scale: Scale = "paper"
    """Size of the experiment: tiny, cifar or paper."""
    device: str = "auto"
    """cpu shows the reduced size for two CPU cores, where the scale has one."""

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.research.experiments.entry import load_experiment
        from nextscale.research.experiments.show import format_experiment

        with init_distributed(self.device) as world:
            print(format_experiment(load_experiment(self.name, self.scale, on_cpu=world.device.type == "cpu")))


@dataclass
class ExperimentRun:
    """Run an experiment: a table with published figures beside ours, a figure, and JSON.

    Run the same command again to resume after a stop, or after the time of --time. Finished runs are not repeated.
    """

    name: Positional[str]
    """As `nextscale experiment list` shows it."""
    scale: Scale = "tiny"
    """tiny (minutes, bundled digits), cifar (CIFAR-10, one GPU or two CPU cores), paper (as published)."""
    out: Path = Path("runs/experiments")
    """Folder for the runs of all experiments; results are in OUT/SCALE/NAME."""
    model: str = ""
    """Checkpoint to measure without training, for experiments whose rows differ only in sampling."""
    refiner: str = ""
    """With --model: a second checkpoint that generates the last scales, for experiments that need one."""
    data: str = ""
    """Images to train on, or a token cache."""
    tokenizer: str = ""
    """Checkpoint folder whose tokenizer is used."""
    features: str = ""
    """Feature network, as in `nextscale evaluate`."""
    reference: str = ""
    """Reference images, or an .npz of statistics."""
    encoder: str = ""
    """Encoder of semantic guidance, for experiments that train with it (see `nextscale train`)."""
    time: str = ""
    """Longest time of this call, such as 30m or 2h: it saves then and says what is left; empty = no limit."""
    images: ReadConfig = field(default_factory=ReadConfig)
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def check(self) -> None:
        if self.time and parse_duration("--time", self.time) == 0:
            raise UserError("--time must be above 0; leave it out for no limit")

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import ExperimentsFolder

        models: Paths = {
            "--model": self.model,
            "--refiner": self.refiner,
            "--tokenizer": self.tokenizer,
        }
        networks: Paths = {"--features": self.features, "--encoder": self.encoder}
        images: Paths = {"--data": self.data, "--reference": self.reference}
        return [ExperimentsFolder("--out", self.out)], list_inputs(images=images, models=models, networks=networks)

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "the figure of an experiment"}

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed, is_main_process
        from nextscale.research.experiments.entry import load_experiment, replace_reading
        from nextscale.research.experiments.run import format_progress, resolve_inputs, run_experiment
        from nextscale.research.experiments.timing import TimeLimit, limit_time
        from nextscale.training.report import report_interruption

        seconds = parse_duration("--time", self.time) if self.time else 0.0
        try:
            with report_interruption(self.out), init_distributed(self.device) as world:
                experiment = load_experiment(self.name, self.scale, on_cpu=world.device.type == "cpu")
                experiment = replace_reading(experiment, self.images)
                options = ("model", "refiner", "data", "tokenizer", "features", "reference", "encoder")
                inputs = resolve_inputs(experiment, {name: getattr(self, name) for name in options})
                with limit_time(seconds):
                    run_experiment(experiment, inputs, self.out, world)
        except TimeLimit:
            if is_main_process():
                print(f"the time of {self.time} is over; {format_progress(experiment, inputs, self.out)}")
                print("the same command goes on from there")
            return
        if world.main:
            folder = self.out / self.scale / self.name
            print((folder / "table.md").read_text(encoding="utf-8"))
            print(f"see {folder}/table.md, figure.png, results.json")
