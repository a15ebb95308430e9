"""The command that finds the cheapest settings of a model on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from nextscale.cli.files import list_inputs
from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import SampleConfig
from nextscale.config.tune import Clock, TuneConfig, check_base, parse_duration, parse_share

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output


@dataclass
class Tune:
    """Find the fastest settings of a model on this machine that keep its quality, and write them as a profile.

    Tries types, guidance that ends early, token pruning, with --refiner a second model, and dynamic experts, alone and
    together, beside the dense model in float32 with the same seeds. Settings are chosen by one half of the reference
    and measured again by the other. Run the same command again to go on after a stop.
    """

    model: Positional[Path]
    """Checkpoint folder. The profile is written into it: MODEL/profiles/NAME.json."""
    reference: str
    """Reference images, as in `nextscale evaluate`; no statistics, because they are divided into two halves."""
    features: str
    """Feature network, as in `nextscale evaluate`."""
    max_loss: str = "1%"
    """Largest share by which the Fréchet distance may rise, by its upper 95 % bound: 1% or 0.01."""
    time: str = "30m"
    """Time for all measurements: 90s, 30m, 1h30m. At least one step of each stage is measured."""
    out: Path | None = None
    """Folder for results and measurements: results.json, table.md, pareto.png, samples.png. Default: MODEL.tune."""
    name: str = "fast"
    """Name of the profile, which `nextscale sample` and other commands take."""
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line take precedence."""
    batch_size: int = 8
    """Batch size for which the time is measured."""
    images: ReadConfig = field(default_factory=ReadConfig)
    shard: int = 250
    """Images that are measured at once; a resumed search repeats at most this many."""
    clock: Clock = "wall"
    """How times are measured: wall, the time that passes; processor, the work of the CPU for this process, on a machine
    that others use, too (with OMP_NUM_THREADS=1)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def check(self) -> None:
        rules = {"batch_size must be 1 or more": self.batch_size >= 1, "shard must be 2 or more": self.shard >= 2}
        check_fields("", self, rules)
        self._build_config()
        check_base(self.settings)

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import JsonFile, RunFolder
        from nextscale.config.profile import KEYS, find_profile

        outputs: list[Output] = [RunFolder("--out", self._choose_out(), (contents.TUNE,))]
        if self.model.is_dir():
            outputs.append(JsonFile("--name", find_profile(self.model, self.name), KEYS))
        inputs = list_inputs(
            images={"--reference": self.reference},
            models={"MODEL": self.model, "--refiner": self.settings.refiner},
            networks={"--features": self.features},
            files={"--config": self.config},
        )
        return outputs, inputs

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "the picture of times and distances"}

    def run(self) -> None:
        import sys

        from nextscale.common.distributed import init_distributed
        from nextscale.tune.run import format_report, tune

        if not self.model.is_dir():
            raise UserError(f"there is no folder {self.model}: tune writes a profile into the model's folder")
        out = self._choose_out()
        with init_distributed(self.device) as world:
            if world.size > 1:
                raise UserError("tune measures times: run it as one process")
            report = tune(
                self.model, self.features, self.reference, out, self._build_config(), world.device,
                name=self.name, command=" ".join(["nextscale", *sys.argv[1:]]),
            )  # fmt: skip
        print(format_report(report, out, self.name))

    def _choose_out(self) -> Path:
        return self.out or self.model.with_name(f"{self.model.resolve().name}.tune")

    def _build_config(self) -> TuneConfig:
        return TuneConfig(
            parse_share("--max-loss", self.max_loss), parse_duration("--time", self.time), self.batch_size, self.shard,
            self.clock, self.settings, self.images,
        )  # fmt: skip
