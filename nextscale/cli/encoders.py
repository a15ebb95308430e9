"""Commands for encoders that learn without labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional, arg

from nextscale.cli.files import Overwrite, list_inputs
from nextscale.config.data import ReadConfig
from nextscale.config.encoder import EncoderRunConfig
from nextscale.config.parse import check_fields

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output


@dataclass
class EncoderTrain:
    """Train a small encoder on your own images without labels (MoCo v2), to guide generators of small images.

    CONFIG is a YAML or JSON file, or the name of a recipe (encoder-cifar10, encoder-digits); options on the command
    line take precedence. Run the same command again to resume an interrupted run. Labels, where there are any, only
    measure the encoder (k-NN accuracy). Start it with torchrun or accelerate launch to train on several processes.
    """

    config: Positional[Path]
    """File with settings, or a recipe's name."""
    data: str
    """'digits', a folder of images or of class sub-folders, parquet, or owner/name on the Hugging Face hub."""
    out: Path
    """Folder to write: config.json, model.safetensors, curves.png, log.jsonl."""
    settings: Annotated[EncoderRunConfig, arg(name="")] = field(default_factory=EncoderRunConfig)
    untrained: bool = False
    """Write the network with its initial weights, as a baseline."""
    accept_changes: bool = False
    """Resume even though settings, data or other inputs have changed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    main_options: ClassVar[tuple[str, ...]] = (
        "config",
        "data",
        "out",
        "encoder.image-size",
        "encoder.widths",
        "train.steps",
        "train.epochs",
        "train.batch-size",
        "train.learning-rate",
        "device",
    )

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder

        folder = RunFolder("--out", self.out, (contents.ENCODER_RUN, contents.UNKNOWN_RUN))
        return [folder], list_inputs(images={"--data": self.data}, files={"CONFIG": self.config})

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.training.encoder import train_encoder
        from nextscale.training.report import report_interruption

        with report_interruption(self.out), init_distributed(self.device) as world:
            values = train_encoder(
                self.settings, self.data, self.out, world,
                accept_changes=self.accept_changes, untrained=self.untrained,
            )  # fmt: skip
        if world.main:
            accuracy = f"; held-out k-NN accuracy {values['knn_accuracy']:.2%}" if "knn_accuracy" in values else ""
            print(f"done: {self.out}{accuracy}")


@dataclass
class EncoderEvaluate:
    """k-NN accuracy of an encoder: the class of each test image by a vote of its 20 nearest training images.

    The vote is weighted (Wu et al. 2018, as DINO has it); an image's feature is the mean over its patches.
    """

    encoder: Positional[str]
    """Folder that `nextscale encoder train` wrote; or any other encoder: DINO's folder or hub name, a file of MoCo v3,
    the folder of a classifier of ours."""
    data: str
    """Labelled images that vote: a folder of class sub-folders, parquet, ..."""
    test: str
    """Labelled images that are measured."""
    images: ReadConfig = field(default_factory=ReadConfig)
    size: int = 0
    """Read images at this side, which the encoder then resizes; 0 = the one that it was made for."""
    out: Path | None = None
    """JSON file to write the result to."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    overwrite: Overwrite = False

    def check(self) -> None:
        check_fields("", self, {"size must be 0 (the encoder's) or more": self.size >= 0})

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import JsonFile

        inputs = list_inputs(images={"--data": self.data, "--test": self.test}, networks={"ENCODER": self.encoder})
        about = {"encoder": self.encoder, "data": self.data, "test": self.test}
        return [JsonFile("--out", self.out, ("knn_accuracy", *about), about)] if self.out else [], inputs

    def run(self) -> None:
        from nextscale.training.encoder import evaluate_encoder

        report = evaluate_encoder(self.encoder, self.data, self.test, self.size, self.out, self.images, self.device)
        print(
            f"{report['test_images']} images: k-NN accuracy {report['knn_accuracy']:.2%} "
            f"(k = {report['neighbours']}, bank of {report['data_images']})"
        )
