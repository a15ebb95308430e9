"""Commands that measure generators, and train and evaluate classifiers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional, arg

from nextscale.cli.files import Adapters, Overwrite, Paths, Scales, list_folders, list_inputs
from nextscale.cli.profiles import ProfileName
from nextscale.common.dtypes import SamplingDtype
from nextscale.common.sizes import parse_size
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.data import ReadConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import Capture, SampleConfig

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output


@dataclass
class Evaluate:
    """Measure generated images: FID, sFID, Inception Score, precision, recall, FD-DINOv2, LPIPS.

    Run the same command again to resume after a stop. Under torchrun the processes share the images.
    """

    source: Positional[str]
    """Checkpoint folder; or images: a folder, a table, a data set on the hub; or an .npz of samples (arr_0, uint8,
    N x H x W x 3) or of features (pool, spatial, logits)."""
    out: Path
    """JSON file for the report. Features are stored in a folder of the same name with the suffix .work."""
    features: tuple[str, ...] = ()
    """Feature networks: Inception's weight file (pt_inception-2015-12-05-6726825d.pth), the folder or hub name of
    DINOv2, or the folder of a classifier (`nextscale classifier train`)."""
    reference: tuple[str, ...] = ()
    """Reference images, or an .npz of statistics (ADM's or `nextscale statistics`'); one for each feature network."""
    num: int = 0
    """Number of images, of a data set drawn from all classes; 0 = all of a data set, 50,000 of a model."""
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line take precedence."""
    profile: ProfileName = ""
    lora: Adapters = ()
    scales: Scales = ""
    reconstruct: str = ""
    """Images that the model's tokenizer encodes and decodes; the reconstructions are measured instead of samples."""
    against: str = ""
    """Images to compare with pair by pair, in any of the forms of SOURCE; a model uses the same seed and labels."""
    lpips: tuple[Path, Path] | None = None
    """LPIPS's two files: torchvision's VGG-16 or AlexNet, and the linear heads of LPIPS 0.1."""
    size: str = "0"
    """Resize and centre-crop images to this size: the side of squares, or HEIGHTxWIDTH such as 24x32. 0 = leave them
    unchanged (images of several sizes get the size that most have, else the median of their short sides, and a note
    says so), and resize references to their size."""
    images: ReadConfig = field(default_factory=ReadConfig)
    images_out: Path | None = None
    """Also write each image into this folder."""
    batch_size: int = 50
    """Batch size. Metrics do not depend on it beyond rounding."""
    decode_batch: int = 0
    """Samples of a batch that are decoded at once, as in `nextscale sample`."""
    shard: int = 1000
    """Images of one file of features; a resumed run repeats at most this many."""
    dtype: SamplingDtype = "auto"
    """Type that a model computes in: float32, bfloat16, float16, int8, or auto, as in `nextscale sample`."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    capture: Capture = "auto"
    """Captured CUDA graphs, as in `nextscale sample`."""
    overwrite: Overwrite = False

    main_options: ClassVar[tuple[str, ...]] = (
        "source", "out", "features", "reference", "num", "cfg", "seed", "profile", "reconstruct", "batch-size", "dtype",
        "device",
    )  # fmt: skip

    def check(self) -> None:
        rules = {f"{name} must be 1 or more": getattr(self, name) >= 1 for name in ("batch_size", "shard")}
        rules |= {f"{name} must be 0 or more": getattr(self, name) >= 0 for name in ("num", "decode_batch")}
        check_fields("", self, rules)
        parse_size("--size", self.size)

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import JsonFile, PicturesFolder, RunFolder

        outputs: list[Output] = [
            JsonFile("--out", self.out, ("source", "protocol", "measures"), {"source": self.source}),
            RunFolder("--out", self.out.with_suffix(".work"), (contents.FEATURES,)),
        ]
        outputs += [PicturesFolder("--images-out", self.images_out)] if self.images_out else []
        images: Paths = {"SOURCE": self.source, "--against": self.against, "--reconstruct": self.reconstruct}
        inputs = list_inputs(
            images={**images, "--reference": self.reference},
            models={"--refiner": self.settings.refiner, "--lora": list_folders(self.lora)},
            networks={"--features": self.features},
            files={"--lpips": self.lpips, "--config": self.config},
        )
        return outputs, inputs

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.config.evaluation import EvaluationConfig
        from nextscale.evaluation.run import evaluate, format_report

        config = EvaluationConfig(
            self.num, self.settings, parse_size("--size", self.size), shard=self.shard, images=self.images,
            batch=self.batch_size, decode_batch=self.decode_batch, dtype=self.dtype, capture=self.capture,
            reconstruct=self.reconstruct, lora=self.lora, scales=self.scales,
        )  # fmt: skip
        with init_distributed(self.device) as world:
            report = evaluate(
                self.source, self.out, self.features, self.reference, config, world,
                against=self.against, lpips=self.lpips, images_out=self.images_out,
            )  # fmt: skip
        if report:
            print(format_report(report, self.out))


@dataclass
class Statistics:
    """Compute the statistics of a data set under a feature network, for `nextscale evaluate --reference`.

    The .npz uses ADM's names (mu, sigma, mu_s, sigma_s), and holds features of some images for precision and recall.
    """

    data: Positional[str]
    """Images (a folder, a table, a data set on the hub) or an .npz of samples."""
    features: str
    """Feature network, as in `nextscale evaluate`."""
    out: Path
    """.npz file to write, for --reference of `nextscale evaluate`."""
    size: str = "0"
    """Resize and centre-crop images to this size: the side of squares, or HEIGHTxWIDTH such as 24x32. 0 = leave them
    unchanged; images of several sizes as in `nextscale evaluate`."""
    images: ReadConfig = field(default_factory=ReadConfig)
    keep: int = 10_000
    """Number of images, drawn from all, whose features are stored."""
    batch_size: int = 50
    """Batch size. Statistics depend on it by rounding only; lower it if memory is short."""
    shard: int = 1000
    """Images of one file of features; a resumed run repeats at most this many."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    overwrite: Overwrite = False

    def check(self) -> None:
        rules = {f"{name} must be 1 or more": getattr(self, name) >= 1 for name in ("keep", "batch_size", "shard")}
        check_fields("", self, rules)
        parse_size("--size", self.size)

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder, StatisticsFile

        outputs: list[Output] = [
            StatisticsFile("--out", self.out),
            RunFolder("--out", self.out.with_suffix(".work"), (contents.FEATURES,)),
        ]
        return outputs, list_inputs(images={"DATA": self.data}, networks={"--features": self.features})

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.config.evaluation import EvaluationConfig
        from nextscale.evaluation.run import make_statistics

        config = EvaluationConfig(
            size=parse_size("--size", self.size), shard=self.shard, images=self.images, batch=self.batch_size
        )
        with init_distributed(self.device) as world:
            reference = make_statistics(self.data, self.features, self.out, config, world, feature_images=self.keep)
        if reference is not None:
            print(f"wrote {self.out}: {reference.network} statistics of {reference.images} images")


@dataclass
class Bench:
    """Time sampling: seconds per image and scale, throughput, peak memory, FLOPs; with --against, of two models.

    Prints a table and, last, one line of JSON.
    """

    model: Positional[str]
    """Checkpoint folder, or owner/name on the Hugging Face hub."""
    against: str = ""
    """A second model. Each round times both, and the report has the ratio of each round."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Batch sizes to time, one after the other."""
    dtypes: tuple[SamplingDtype, ...] = ("auto",)
    """Types to time: float32, bfloat16, float16, int8, or auto, as in `nextscale sample`."""
    rounds: int = 5
    """Timed rounds, after one to warm up."""
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line take precedence."""
    profile: ProfileName = ""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    capture: Capture = "auto"
    """Captured CUDA graphs, as in `nextscale sample`."""

    def check(self) -> None:
        sizes = len(self.batch_sizes) > 0 and min(self.batch_sizes) >= 1
        check_fields("", self, {"batch_sizes must be 1 or more": sizes, "rounds must be 1 or more": self.rounds >= 1})

    def run(self) -> None:
        import json

        from nextscale.evaluation.latency import compare_models, format_comparison

        models = [self.model, self.against] if self.against else [self.model]
        report = compare_models(
            models, self.batch_sizes, self.dtypes, self.rounds, self.settings, self.device, self.capture
        )
        print(format_comparison(report))
        print(json.dumps(report))


@dataclass
class ClassifierTrain:
    """Train a small classifier whose features measure generators of small images (`nextscale evaluate`).

    CONFIG is a YAML or JSON file, or the name of a recipe (classifier-cifar10); options on the command line take
    precedence. Run the same command again to resume an interrupted run.
    """

    config: Positional[Path]
    """File with settings, or a recipe's name."""
    data: str
    """'digits', a folder of class sub-folders, parquet, or owner/name on the Hugging Face hub."""
    out: Path
    """Folder to write: config.json, model.safetensors, best/, curves.png, log.jsonl."""
    settings: Annotated[ClassifierRunConfig, arg(name="")] = field(default_factory=ClassifierRunConfig)
    accept_changes: bool = False
    """Resume even though settings, data or other inputs have changed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    main_options: ClassVar[tuple[str, ...]] = (
        "config",
        "data",
        "out",
        "classifier.image-size",
        "images.flip",
        "train.steps",
        "train.epochs",
        "train.batch-size",
        "train.learning-rate",
        "device",
    )

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder

        folder = RunFolder("--out", self.out, (contents.CLASSIFIER_RUN, contents.UNKNOWN_RUN))
        return [folder], list_inputs(images={"--data": self.data}, files={"CONFIG": self.config})

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.training.classifier import train_classifier
        from nextscale.training.report import report_interruption

        with report_interruption(self.out), init_distributed(self.device) as world:
            values = train_classifier(self.settings, self.data, self.out, world, accept_changes=self.accept_changes)
        if values:
            loss, accuracy = values["validation_loss"], values["validation_accuracy"]
            print(f"done: {self.out}; held-out accuracy {accuracy:.2%}, cross-entropy {loss:.3f} nats")


@dataclass
class ClassifierEvaluate:
    """Measure accuracy and cross-entropy of a classifier on labelled images."""

    model: Positional[Path]
    """Folder that `nextscale classifier train` wrote."""
    data: str
    """'digits', a folder of class sub-folders, parquet, tar, or owner/name on the Hugging Face hub."""
    images: ReadConfig = field(default_factory=ReadConfig)
    out: Path | None = None
    """JSON file to write the result to."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import JsonFile

        inputs = list_inputs(images={"--data": self.data}, models={"MODEL": self.model})
        about = {"data": self.data}
        return [JsonFile("--out", self.out, ("accuracy", "loss", *about), about)] if self.out else [], inputs

    def run(self) -> None:
        from nextscale.training.classifier import evaluate_classifier

        report = evaluate_classifier(self.model, self.data, self.out, self.images, self.device)
        print(f"{report['images']} images: accuracy {report['accuracy']:.2%}, cross-entropy {report['loss']:.3f} nats")
