"""Commands that analyse trained models. Each writes a figure and a JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from nextscale.cli.files import Overwrite, list_inputs
from nextscale.config.analysis import AnalysisConfig, CopiesConfig, DynamicAnalysisConfig, ErrorsConfig
from nextscale.config.data import ReadConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import SampleConfig

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output, ReportFolder


Analysis = Annotated[AnalysisConfig, arg(name="")]


def _describe_folder(out: Path, analysis: str, *figures: str) -> ReportFolder:
    """The output of an analysis: NAME.json, by which it knows its own results, and figures."""
    from nextscale.common.outputs import ReportFolder

    return ReportFolder("--out", out, f"{analysis}.json", ("analysis",), {"analysis": analysis}, figures)


@dataclass
class AnalysePyramid:
    """Show how images become tokens: for each scale its tokens, what they add to the canvas, and what is left.

    Tokens whose codes are similar have similar colours. Bright positions of the maps have large values.
    """

    model: Positional[str]
    """Checkpoint folder of a tokenizer or a whole model, or a name on the Hugging Face hub."""
    images: Positional[tuple[Path, ...]]
    """Image files; a folder, a parquet file or a tar archive gives its images, with or without labels."""
    out: Path
    """Folder for pyramid.json and pyramid.png."""
    num: int = 1
    """How many of the images are shown, from the first."""
    reading: Annotated[ReadConfig, arg(name="images")] = field(default_factory=ReadConfig)
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    overwrite: Overwrite = False

    def check(self) -> None:
        check_fields("", self, {"num must be 1 or more": self.num >= 1})

    def list_files(self) -> tuple[list[Output], list[Input]]:
        inputs = list_inputs(models={"MODEL": self.model}, images={"IMAGES": self.images})
        return [_describe_folder(self.out, "pyramid", "pyramid.png")], inputs

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "a figure"}

    def run(self) -> None:
        from nextscale.research.analysis.pyramid import analyse_pyramid

        report = analyse_pyramid(
            self.model, self.images, self.out, num=self.num, device=self.device, reading=self.reading
        )
        for image in report["images"]:
            steps = zip(report["scales"], image["left"], image["psnr_db"], strict=True)
            values = "; ".join(f"{scale} {left:.0%}, {db:.1f} dB" for scale, left, db in steps)
            print(f"{image['image']}: left to encode and PSNR after each scale: {values}")
        print(f"see {self.out}/pyramid.png, pyramid.json")


@dataclass
class _ModelsOnImages:
    """What analyses of models on held-out images share; `report` names the report and the figure."""

    report: ClassVar[str]
    models: Positional[tuple[str, ...]]
    """Checkpoint folders, or names on the Hugging Face hub."""
    data: str
    """Images ('digits', a folder, parquet, owner/name on the hub), or a token cache."""
    out: Path
    """Folder for the report and the figure."""
    names: tuple[str, ...] = ()
    """Names of the models in the figure; default: their folders."""
    analysis: Analysis = field(default_factory=AnalysisConfig)
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        inputs = list_inputs(images={"--data": self.data}, models={"MODELS": self.models})
        return [_describe_folder(self.out, self.report, f"{self.report}.png")], inputs

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "a figure"}


@dataclass
class AnalyseLoad(_ModelsOnImages):
    """Expert load of mixtures of experts on held-out images, by block, scale and expert (MEPA, Table 1).

    Loads are normalised to a sum of 64; the report has their sample variance over the experts.
    """

    report: ClassVar[str] = "load"
    out: Path
    """Folder for load.json and load.png."""

    def run(self) -> None:
        from nextscale.research.analysis.load import analyse_load

        report = analyse_load(self.models, self.data, self.out, self.analysis, self.names)
        for model in report["models"]:
            loads = " ".join(f"{load:.2f}" for load in model["load"])
            print(f"{model['name']}: load {loads}; variance {model['load_variance']:.3f}")
        print(f"see {self.out}/load.png, load.json")


@dataclass
class AnalyseRouting(_ModelsOnImages):
    """Routing maps: how often each expert is selected at each position of each scale (MEPA, Fig. 4)."""

    report: ClassVar[str] = "routing"
    out: Path
    """Folder for routing.json and routing.png."""
    block: int = 0
    """Block whose router is shown, counted from 1; 0 = the last but one."""
    image: int | None = None
    """Index of a single held-out image to show; default: the share over all images."""

    def check(self) -> None:
        check_fields(
            "",
            self,
            {
                "block must be 0 or more": self.block >= 0,
                "image must be 0 or more": self.image is None or self.image >= 0,
            },
        )

    def run(self) -> None:
        from nextscale.research.analysis.routing import analyse_routing

        analyse_routing(self.models, self.data, self.out, self.analysis, self.names, block=self.block, image=self.image)
        print(f"see {self.out}/routing.png, routing.json")


@dataclass
class AnalyseFeatures(_ModelsOnImages):
    """Plot a block's outputs for tokens of each scale, and measure how far apart scales are (MEPA, Fig. 1a)."""

    report: ClassVar[str] = "features"
    out: Path
    """Folder for features.json and features.png."""
    block: int = 0
    """Block whose output is shown, counted from 1; 0 = the middle one."""
    points: int = 256
    """Number of tokens of each scale in the plot."""
    projection: Literal["pca", "tsne"] = "pca"
    """Projection to two dimensions; t-SNE needs scikit-learn."""

    def check(self) -> None:
        check_fields(
            "", self, {"block must be 0 or more": self.block >= 0, "points must be 1 or more": self.points >= 1}
        )

    def list_needs(self) -> dict[str, str]:
        return super().list_needs() | ({"sklearn": "t-SNE"} if self.projection == "tsne" else {})

    def run(self) -> None:
        from nextscale.research.analysis.features import analyse_features

        report = analyse_features(
            self.models, self.data, self.out, self.analysis, self.names,
            block=self.block, points=self.points, projection=self.projection,
        )  # fmt: skip
        for model in report["models"]:
            print(f"{model['name']}: {model['variance_between_scales']:.1%} of the variance is between scales")
        print(f"see {self.out}/features.png, features.json")


@dataclass
class AnalyseAttention(_ModelsOnImages):
    """How much attention tokens pay to their own scale and to earlier ones, by block and scale (M-VAR's motivation).

    The share of the softmax, teacher-forced on held-out images, mean over images, heads and tokens.
    """

    report: ClassVar[str] = "attention"
    out: Path
    """Folder for attention.json and attention.png."""

    def run(self) -> None:
        from nextscale.research.analysis.attention import analyse_attention

        report = analyse_attention(self.models, self.data, self.out, self.analysis, self.names)
        for model in report["models"]:
            print(
                f"{model['name']}: {model['own_share']:.1%} of the attention is to the token's own scale "
                f"({model['uniform_share']:.1%} if all visible tokens got the same), the rest to earlier ones"
            )
        print(f"see {self.out}/attention.png, attention.json")


@dataclass
class AnalyseErrors:
    """Sample images without errors, and once for each scale with errors at that scale (MEPA, Fig. 1b).

    An error replaces tokens of one scale by random ones. Later scales are sampled with the same random numbers.
    """

    models: Positional[tuple[str, ...]]
    """Checkpoint folders, or names on the Hugging Face hub."""
    out: Path
    """Folder for errors.json, errors.png (images scale by scale) and distance.png (distance of the final images)."""
    names: tuple[str, ...] = ()
    """Names of the models in the figure; default: their folders."""
    labels: str = ""
    """Classes to sample in turn, names or numbers: 3,7; empty = all."""
    errors: Annotated[ErrorsConfig, arg(name="")] = field(default_factory=ErrorsConfig)
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line take precedence."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        inputs = list_inputs(
            models={"MODELS": self.models, "--refiner": self.settings.refiner}, files={"--config": self.config}
        )
        return [_describe_folder(self.out, "errors", "errors.png", "distance.png")], inputs

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "a figure"}

    def run(self) -> None:
        from nextscale.research.analysis.errors import analyse_errors

        report = analyse_errors(self.models, self.out, self.errors, self.settings, self.names, labels=self.labels)
        for model in report["models"]:
            distances = ", ".join(
                f"{model['scales'][e['scale'] - 1]}: {e['image_distance']:.3f}" for e in model["errors"]
            )
            other = model["another_image"]["image_distance"]
            print(f"{model['name']}: RMS distance by scale of the error {distances}; another image: {other:.3f}")
        print(f"see {self.out}/errors.png, distance.png, errors.json")


@dataclass
class AnalyseCopies:
    """Show samples beside the training images nearest to them, and how near held-out images are to these.

    Distances are the root mean square of the difference of pixels in 0 to 1.
    """

    model: Positional[str]
    """Checkpoint folder, or a name on the Hugging Face hub."""
    data: str
    """The images that the model was trained on: 'digits', a folder, parquet, owner/name on the hub."""
    held_out: str
    """Images of the same kind that it was not trained on, given in the same ways."""
    out: Path
    """Folder for copies.json and copies.png."""
    labels: str = ""
    """Classes to sample in turn, names or numbers: 3,7; empty = all."""
    copies: Annotated[CopiesConfig, arg(name="")] = field(default_factory=CopiesConfig)
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    reading: Annotated[ReadConfig, arg(name="images")] = field(default_factory=ReadConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line take precedence."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        inputs = list_inputs(
            models={"MODEL": self.model, "--refiner": self.settings.refiner},
            images={"--data": self.data, "--held-out": self.held_out}, files={"--config": self.config},
        )  # fmt: skip
        return [_describe_folder(self.out, "copies", "copies.png")], inputs

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "a figure"}

    def run(self) -> None:
        from nextscale.research.analysis.copies import analyse_copies

        report = analyse_copies(
            self.model, self.data, self.held_out, self.out, self.copies, self.settings,
            labels=self.labels, reading=self.reading,
        )  # fmt: skip
        medians = (report["distance"][name]["median"] for name in ("samples", "held_out"))
        print(
            "distance to the nearest training image, median: samples {:.4f}, held-out images {:.4f}".format(*medians)
            + f"\n{report['share_of_copies']:.1%} of the samples are nearer to a training image than 95 % of the "
            f"held-out images are (of new images 5 % would be)\nsee {self.out}/copies.png, copies.json"
        )


@dataclass
class AnalyseDynamic:
    """Dynamic experts: maps of experts per token, samples with fewer experts, FLOPs (DMoE-VAR, Fig. 2, 12).

    For a model that `nextscale sparsify` made. FLOPs are counted from the experts that ran.
    """

    model: Positional[str]
    """Checkpoint folder, or name on the Hugging Face hub."""
    out: Path
    """Folder for experts.png, samples.png and dynamic.json."""
    analysis: Annotated[DynamicAnalysisConfig, arg(name="")] = field(default_factory=DynamicAnalysisConfig)
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line take precedence."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import ReportFolder

        inputs = list_inputs(models={"MODEL": self.model}, files={"--config": self.config})
        return [
            ReportFolder("--out", self.out, "dynamic.json", ("model", "rows"), figures=("experts.png", "samples.png"))
        ], inputs

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "a figure"}

    def run(self) -> None:
        from nextscale.research.analysis.dynamic import analyse_dynamic

        report = analyse_dynamic(self.model, self.out, self.analysis, self.settings)
        for row in report["rows"]:
            active = " ".join(f"{share:.0%}" for share in row["active_per_scale"])
            print(f"{row['name']}: {row['share']:.1%} of the dense FLOPs; of the FFNs, per scale: {active}")
        print(f"see {self.out}/experts.png, samples.png, dynamic.json")


@dataclass
class AnalyseConvergence:
    """Plot validation and training losses of several runs, in total and per scale (MEPA, Fig. 5).

    Prints how many times faster than the first run each run reaches the first run's lowest validation loss.
    """

    runs: Positional[tuple[str, ...]]
    """Folders of `nextscale train`; the first one is the reference."""
    out: Path
    """Folder for convergence.json and convergence.png."""
    names: tuple[str, ...] = ()
    """Names of the runs in the figure; runs of one name become one curve, their mean. Default: their folders."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        inputs = list_inputs(models={"RUNS": self.runs})
        return [_describe_folder(self.out, "convergence", "convergence.png")], inputs

    def list_needs(self) -> dict[str, str]:
        return {"matplotlib": "a figure"}

    def run(self) -> None:
        from nextscale.research.analysis.convergence import analyse_convergence

        report = analyse_convergence(self.runs, self.out, self.names)
        for curve in report["curves"]:
            reached = f"step {curve['steps_to_target']:.0f}" if curve["speedup"] else "never"
            sooner = f", {curve['speedup']:.2f} times as fast" if curve["speedup"] else ""
            lowest = min(curve["validation_loss"])
            print(f"{curve['name']}: lowest {lowest:.4f}; {report['target']:.4f} reached: {reached}{sooner}")
        print(f"see {self.out}/convergence.png, convergence.json")
