"""Commands that look into trained models: each leaves a picture and a JSON file in its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from nextscale.analysis.config import AnalysisConfig

Shown = Annotated[AnalysisConfig, arg(name="")]


@dataclass
class AnalyseLoad:
    """Expert load of mixtures of experts on held-out images, per block, scale and expert (MEPA, Table 1).

    Normalised to a sum of 64, with the sample variance over the experts.
    """

    models: Positional[tuple[str, ...]]
    """Checkpoint folders, or names on the Hugging Face hub."""
    data: str
    """Images ('digits', a folder, parquet, owner/name on the hub), or a token cache."""
    out: Path
    """Folder for load.json and load.png."""
    names: tuple[str, ...] = ()
    """What to call the models; default: by their folders."""
    shown: Shown = field(default_factory=AnalysisConfig)

    def run(self) -> None:
        from nextscale.analysis.load import analyse_load

        report = analyse_load(self.models, self.data, self.out, self.shown, self.names)
        for model in report["models"]:
            loads = " ".join(f"{load:.2f}" for load in model["load"])
            print(f"{model['name']}: load {loads}; variance {model['load_variance']:.3f}")
        print(f"see {self.out}/load.png, load.json")


@dataclass
class AnalyseRouting:
    """Routing maps: how often each expert is chosen at each position of each scale's map (MEPA, Fig. 4)."""

    models: Positional[tuple[str, ...]]
    """Checkpoint folders, or names on the Hugging Face hub."""
    data: str
    """Images ('digits', a folder, parquet, owner/name on the hub), or a token cache."""
    out: Path
    """Folder for routing.json and routing.png."""
    names: tuple[str, ...] = ()
    """What to call the models; default: by their folders."""
    block: int = 0
    """Block whose router is shown, counted from 1; 0 = the last but one."""
    image: int | None = None
    """Number of one held-out image to show alone; default: the share of all images."""
    shown: Shown = field(default_factory=AnalysisConfig)

    def run(self) -> None:
        from nextscale.analysis.routing import analyse_routing

        analyse_routing(self.models, self.data, self.out, self.shown, self.names, block=self.block, image=self.image)
        print(f"see {self.out}/routing.png, routing.json")
