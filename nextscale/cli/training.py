"""Commands that train: quickstart, tokenizer, token cache, generator."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from nextscale.cli.files import Overwrite, Paths, list_inputs
from nextscale.common.errors import UserError
from nextscale.config.data import DataConfig, ReadConfig
from nextscale.config.parse import SEED_RULE, check_fields, is_seed
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.tokenizer_training import TokenizerRunConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.pyramid import Pyramid

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output


if TYPE_CHECKING:
    from nextscale.data.datasets import ImageSet
    from nextscale.pipeline import Pipeline


@dataclass
class Quickstart:
    """Train a small tokenizer and a small model on images, sample, and measure, in minutes.

    Without options it uses scikit-learn's bundled digits. Give your own images with --data. Settings can also
    come from a YAML or JSON file (--config FILE); options on the command line take precedence. Run the same command
    again to resume an interrupted run.
    """

    settings: Annotated[QuickstartConfig, arg(name="")] = field(default_factory=QuickstartConfig)
    out: Path = Path("runs/quickstart")
    """Run folder: checkpoints, pictures, curves, metrics.json. `nextscale sample` takes it as a model."""
    config: Path | None = None
    """YAML or JSON file with settings, in the form of the run folder's quickstart.json."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    main_options: ClassVar[tuple[str, ...]] = (
        "data",
        "captions",
        "out",
        "start",
        "config",
        "image-size",
        "limit",
        "held-out",
        "max-epochs",
        "train-tokenizer.steps",
        "train-transformer.steps",
        "seed",
    )

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder

        folder = RunFolder("--out", self.out, (contents.QUICKSTART_RUN,))
        models: Paths = {"--start": self.settings.start}
        return [folder], list_inputs(
            images={"--data": self.settings.data}, models=models, files={"--config": self.config}
        )

    def run(self) -> None:
        from nextscale.quickstart.few import ADAPTER
        from nextscale.quickstart.run import run_quickstart
        from nextscale.training.report import format_quickstart_report, report_interruption

        with report_interruption(self.out, self.out / ADAPTER):
            metrics = run_quickstart(self.settings, self.out, draw_routing, self.device)
        print("\n" + format_quickstart_report(metrics, self.out))


@dataclass
class TokenizerTrain:
    """Train a tokenizer on your own images, from scratch or from an imported one.

    CONFIG is a YAML or JSON file, or the name of a recipe (tokenizer-cifar10); options on the command line take
    precedence. Run the same command again to resume an interrupted run. Start it with torchrun or accelerate launch to
    train on several processes.
    """

    config: Positional[Path]
    """File with settings, or a recipe's name."""
    data: str
    """'digits', a folder of images or of class sub-folders, or a .parquet file with columns image and label."""
    out: Path
    """Folder to write: a checkpoint, reconstructions.png, curves.png, evaluation.json, log.jsonl."""
    settings: Annotated[TokenizerRunConfig, arg(name="")] = field(default_factory=TokenizerRunConfig)
    accept_changes: bool = False
    """Resume even though settings, data or other inputs have changed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    main_options: ClassVar[tuple[str, ...]] = (
        "config",
        "data",
        "out",
        "start",
        "image-size",
        "train.steps",
        "train.epochs",
        "train.batch-size",
        "train.learning-rate",
        "images.flip",
        "device",
    )

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder

        inputs = list_inputs(
            images={"--data": self.data}, models={"--start": self.settings.start}, files={"CONFIG": self.config}
        )
        return [RunFolder("--out", self.out, (contents.TOKENIZER_RUN, contents.UNKNOWN_RUN))], inputs

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.training.report import format_tokenizer_report, report_interruption
        from nextscale.training.tokenizer import train_tokenizer

        with report_interruption(self.out), init_distributed(self.device) as world:
            report = train_tokenizer(self.settings, self.data, self.out, world, accept_changes=self.accept_changes)
        if report:
            print(format_tokenizer_report(report))


@dataclass
class TokenizerEvaluate:
    """Measure a tokenizer: PSNR, SSIM, codebook usage and perplexity, with a picture of reconstructions by scale."""

    model: Positional[Path]
    """Checkpoint folder."""
    data: str
    """'digits', a folder of images or of class sub-folders, or a .parquet file with columns image and label."""
    out: Path | None = None
    """Folder for report.json and reconstructions.png."""
    limit: int = 1_000_000
    """Use at most this many images, chosen at random."""
    per_scale: bool = False
    """Also measure the PSNR of images that are decoded from the scales up to each one, which takes longer."""
    images: ReadConfig = field(default_factory=ReadConfig)
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    overwrite: Overwrite = False

    def check(self) -> None:
        check_fields("", self, {"limit must be 1 or more": self.limit >= 1})

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import ReportFolder

        inputs = list_inputs(images={"--data": self.data}, models={"MODEL": self.model})
        if self.out is None:
            return [], inputs
        keys, figures = ("psnr_db", "codebook", "usage_per_scale"), ("reconstructions.png",)
        return [ReportFolder("--out", self.out, "report.json", keys, figures=figures)], inputs

    def run(self) -> None:
        from nextscale.training.report import format_tokenizer_report
        from nextscale.training.tokenizer import evaluate_folder

        report = evaluate_folder(
            self.model, self.data, self.limit, self.out, self.images, self.device, per_scale=self.per_scale
        )
        print(format_tokenizer_report(report))


@dataclass
class Tokenize:
    """Encode a data set once, into a cache of tokens that `nextscale train` reads instead of images.

    Run the same command again to resume. Start it with torchrun to share the work among processes.
    """

    data: Positional[str]
    """'digits', a folder of images or of class sub-folders, parquet, or owner/name on the Hugging Face hub."""
    tokenizer: Path
    """Checkpoint folder whose tokenizer is used."""
    out: Path
    """Folder of the cache to write, which `nextscale train` reads."""
    images: DataConfig = field(default_factory=DataConfig)
    views: int = 1
    """Encode each training image this many times, with another random crop and mirroring each time."""
    encoder: str = ""
    """Store the features of a self-supervised encoder too (DINOv2, DINOv3): its folder, or its name on the hub."""
    sizes: tuple[str, ...] = ()
    """Also encode the images at other scales than the tokenizer's, for `nextscale train --sizes.scales`: one or more
    lists of the sides of token maps, such as 1,2,3,4 1,2x3,4x6. Each image gets the sizes of the nearest shape."""
    captions: bool = False
    """Store the captions of the images too, for a model whose text encoder is trained along."""
    text_encoder: str = ""
    """Store the captions and the embeddings that a text encoder (T5, CLIP, SigLIP) has of them: its folder, or its name
    on the hub."""
    text_max_tokens: int = 64
    """Tokens of a caption that --text-encoder is given; longer captions are cut."""
    control: tuple[Literal["edges", "low-resolution"], ...] = ()
    """Store control pictures of the images too, for a model that reads them."""
    shard: int = 8192
    """Images per file of the cache; an interrupted call repeats at most this many."""
    batch_size: int = 64
    """Batch size. Tokens do not depend on it."""
    seed: int = 0
    """Seed of the split, the crops and the mirroring."""
    accept_changes: bool = False
    """Keep what --out has even though files of the data have changed, as when only their modification times did."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def check(self) -> None:
        rules = {f"{name} must be 1 or more": getattr(self, name) >= 1 for name in ("views", "shard", "batch_size")}
        [Pyramid.parse(text) for text in self.sizes]
        rules["control must not name a kind twice"] = len({*self.control}) == len(self.control)
        rules["text_max_tokens must be 4 to 65536"] = 4 <= self.text_max_tokens <= 65536
        check_fields("", self, {**rules, SEED_RULE: is_seed(self.seed)})

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder

        models: Paths = {"--tokenizer": self.tokenizer}
        networks: Paths = {"--encoder": self.encoder, "--text-encoder": self.text_encoder}
        inputs = list_inputs(images={"DATA": self.data}, models=models, networks=networks)
        return [RunFolder("--out", self.out, (contents.TOKEN_CACHE,))], inputs

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.training.tokenize import tokenize

        if self.views > 1 and not (self.images.random_crop or self.images.flip):
            raise UserError(
                f"--views {self.views} would encode the same pixels {self.views} times: give --images.random-crop or "
                "--images.flip, too, or --views 1"
            )
        with init_distributed(self.device) as world:
            tokenize(
                self.data, self.tokenizer, self.out, self.images, self.seed, world,
                views=self.views, shard=self.shard, batch=self.batch_size, encoder=self.encoder,
                accept_changes=self.accept_changes, captions=self.captions, text_encoder=self.text_encoder,
                text_max_tokens=self.text_max_tokens, sizes=[Pyramid.parse(text) for text in self.sizes],
                control=self.control,
            )  # fmt: skip


@dataclass
class Train:
    """Train a generator on your own images, from scratch or from a checkpoint.

    CONFIG is a YAML or JSON file, or the name of a recipe (var-d16, cifar10); options on the command line take
    precedence. An unfinished run in --out is resumed. Start it with torchrun or accelerate launch to train on several
    processes.
    """

    config: Positional[Path]
    """File with settings, or a recipe's name."""
    out: Path
    """Run folder: the checkpoint for `nextscale sample`, best/, samples, curves.png, log.jsonl, training states."""
    settings: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)
    extend: bool = False
    """Train a finished run further: give more --train.steps."""
    accept_changes: bool = False
    """Resume even though settings, data or other inputs have changed."""
    dry_run: bool = False
    """Print parameters, memory, arithmetic and time, and do not train."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    main_options: ClassVar[tuple[str, ...]] = (
        "config",
        "data",
        "tokenizer",
        "start",
        "out",
        "train.steps",
        "train.epochs",
        "train.batch-size",
        "train.learning-rate",
        "transformer.depth",
        "lora.rank",
        "loss.encoder",
        "dry-run",
        "device",
    )

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder

        given = self.settings
        inputs = list_inputs(
            images={"--data": given.data},
            models={"--tokenizer": given.tokenizer, "--start": given.start},
            networks={"--loss.encoder": given.loss.encoder},
            files={"CONFIG": self.config},
        )
        return [RunFolder("--out", self.out, (contents.TRAIN_RUN, contents.UNKNOWN_RUN))], inputs

    def run(self) -> None:
        if self.dry_run:
            from nextscale.training.estimate import estimate_cost

            print(estimate_cost(self.settings))
            return
        _train(self.settings, self.out, self.device, self.extend, self.accept_changes)


@dataclass
class Resume:
    """Resume an interrupted run of `nextscale train`, with the settings of its run.json."""

    out: Positional[Path]
    """Run folder."""
    accept_changes: bool = False
    """Resume even though the data or the tokenizer have changed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    def run(self) -> None:
        from nextscale.training.transformer import read_run_config

        _train(read_run_config(self.out), self.out, self.device, extend=False, accept_changes=self.accept_changes)


def _train(settings: RunConfig, out: Path, device: str, extend: bool, accept_changes: bool) -> None:
    from nextscale.common.distributed import init_distributed
    from nextscale.training.report import format_training_report, report_interruption
    from nextscale.training.transformer import train_transformer

    with report_interruption(out), init_distributed(device) as world:
        values = train_transformer(settings, out, world, extend=extend, accept_changes=accept_changes)
    if world.main:
        print(format_training_report(values, out, settings.start if settings.lora.on else ""))


def draw_routing(pipeline: Pipeline, held_out: ImageSet, config: QuickstartConfig, folder: Path) -> None:
    """Write routing.png and routing.json of the quickstart's mixture of experts."""
    from nextscale.config.analysis import AnalysisConfig
    from nextscale.research.analysis.analyzed_model import AnalyzedModel, describe_analysis
    from nextscale.research.analysis.routing import write_routing_maps

    analysis, shown = AnalysisConfig(seed=config.seed), range(min(len(held_out), 500))
    analyzed = AnalyzedModel("model", pipeline, held_out.to_examples(), shown, analysis)
    write_routing_maps([analyzed], describe_analysis(config.data, analysis, pipeline.device), folder)
