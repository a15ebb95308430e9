"""The commands of `nextscale`, each a dataclass of its options. Parsed without torch; run imports what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nextscale.config import SampleConfig
from nextscale.errors import UserError
from nextscale.pyramid import Pyramid
from nextscale.quickstart.config import QuickstartConfig
from nextscale.train.tokenizer_config import TokenizerRunConfig

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class Quickstart:
    """Train a small tokenizer and model on images, sample, and measure: the whole road in minutes.

    Without options it uses scikit-learn's bundled digits. Give your own images with --data. Settings can also
    come from a YAML or JSON file (--config FILE); options on the command line win. Running the same command again
    goes on where an interrupted run stopped.
    """

    settings: Annotated[QuickstartConfig, arg(name="")] = field(default_factory=QuickstartConfig)
    out: Path = Path("runs/quickstart")
    """Run folder: checkpoints, pictures, curves, metrics.json. `nextscale sample` takes it as a model."""
    config: Path | None = None
    """YAML or JSON file with settings, in the form of the run folder's quickstart.json."""

    def run(self) -> None:
        from nextscale.quickstart.run import run_quickstart
        from nextscale.train.report import quickstart_report, report_interruption

        with report_interruption(self.out):
            metrics = run_quickstart(self.settings, self.out)
        print("\n" + quickstart_report(metrics, self.out))


@dataclass
class Sample:
    """Generate images from a model and write them as one grid."""

    model: Positional[str]
    """Checkpoint folder, or owner/name on the Hugging Face hub."""
    labels: str
    """Classes to draw, separated by commas: indices or names, or 'none' for no label. One image for each."""
    out: Path
    """The grid, a PNG file."""
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with settings (cfg, top_k, top_p, temperature, seed, smooth, official_seeding); options on the
    command line win."""
    tokens_out: Path | None = None
    """Also write a safetensors file with `tokens` (int64, images x all positions, coarse to fine) and `images`
    (float32, B x 3 x H x W in 0 to 1)."""
    images_out: Path | None = None
    """Also write each image into this folder."""
    batch_size: int = 16
    """Images at once, 1 or more. It does not change an image; --official-seeding makes one batch of all."""
    dtype: Dtype | None = None
    """What to compute in; default float32 on a CPU, the stored type elsewhere."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        from nextscale.pipeline import Pipeline

        labels = parse_labels(self.labels)
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be 1 or more; got {self.batch_size}")
        pipeline = Pipeline.from_pretrained(self.model, dtype=self.dtype, device=self.device)
        images = pipeline.sample(labels, self.settings, batch_size=self.batch_size, progress=len(labels) > 1)
        _write_outputs(images, self.out, self.tokens_out, self.images_out)
        print(f"wrote {len(labels)} images to {self.out}")


@dataclass
class Reconstruct:
    """Send images through the tokenizer and back, to see what it keeps.

    An image of the model's size is used as it is; another is resized on its short side and centre-cropped.
    """

    model: Positional[str]
    """Checkpoint folder, or owner/name on the Hugging Face hub."""
    images: Positional[tuple[Path, ...]]
    """Image files."""
    out: Path
    """The reconstructions as one grid, a PNG file."""
    tokens_out: Path | None = None
    """Also write a safetensors file with `tokens` and `images`, as `nextscale sample` does."""
    images_out: Path | None = None
    """Also write each reconstruction into this folder."""
    dtype: Dtype | None = None
    """What to compute in; default float32 on a CPU, the stored type elsewhere."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        from nextscale.pipeline import Pipeline

        pipeline = Pipeline.from_pretrained(self.model, dtype=self.dtype, device=self.device)
        _say_enlarged(self.images, pipeline.config.image_size)
        images = pipeline.reconstruct(self.images)
        _write_outputs(images, self.out, self.tokens_out, self.images_out)
        print(f"wrote {len(self.images)} reconstructions to {self.out}")


@dataclass
class Edit:
    """Repaint part of an image: in-painting, out-painting, or another class inside the mask."""

    model: Positional[str]
    """Checkpoint folder, or owner/name on the Hugging Face hub."""
    image: Positional[Path]
    """Image file; one of another size than the model's is resized on its short side and centre-cropped."""
    mask: Path
    """Picture of the image's size: white stays, black is repainted."""
    out: Path
    """The edited image, a PNG file."""
    label: str = "none"
    """Class to paint, index or name; 'none' continues the image."""
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line win."""
    tokens_out: Path | None = None
    """Also write a safetensors file with `tokens` and `images`, as `nextscale sample` does."""
    dtype: Dtype | None = None
    """What to compute in; default float32 on a CPU, the stored type elsewhere."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        from nextscale.data.images import load_mask
        from nextscale.pipeline import Pipeline

        labels = parse_labels(self.label)
        if len(labels) != 1:
            raise UserError(f"--label takes one class; got '{self.label}'")
        pipeline = Pipeline.from_pretrained(self.model, dtype=self.dtype, device=self.device)
        _say_enlarged([self.image], pipeline.config.image_size)
        mask, resized = load_mask(self.mask, self.image, pipeline.config.image_size)
        if resized:
            print(f"note: {self.mask} is not of the size of {self.image} and was resized to it")
        if not (mask <= 0.5).any():
            print(f"note: {self.mask} keeps everything (it is white); the result is the reconstruction")
        elif not (mask > 0.5).any():
            print(f"note: {self.mask} keeps nothing (it is black); the result is a plain sample")
        images = pipeline.edit(self.image, mask, labels[0], self.settings)
        _write_outputs(images, self.out, self.tokens_out, None, as_grid=False)
        print(f"wrote {self.out}")


@dataclass
class TokenizerTrain:
    """Train a tokenizer on your own images, from scratch or from an imported one.

    CONFIG is a YAML or JSON file (configs/tokenizer_cifar10.yaml is one); options on the command line win. Running
    the same command again goes on where an interrupted run stopped.
    """

    config: Positional[Path]
    """File with settings."""
    data: str
    """'digits', a folder of images or of class sub-folders, or a .parquet file with columns image and label."""
    out: Path
    """Folder to write: a checkpoint, reconstructions.png, curves.png, evaluation.json, log.jsonl."""
    settings: Annotated[TokenizerRunConfig, arg(name="")] = field(default_factory=TokenizerRunConfig)

    def run(self) -> None:
        from nextscale.train.report import report_interruption, tokenizer_report
        from nextscale.train.tokenizer_run import train_tokenizer

        with report_interruption(self.out):
            report = train_tokenizer(self.settings, self.data, self.out)
        print(tokenizer_report(report))


@dataclass
class TokenizerEvaluate:
    """Measure a tokenizer: PSNR, SSIM, codebook usage and perplexity, and a picture of each scale's share."""

    model: Positional[Path]
    """Checkpoint folder."""
    data: str
    """'digits', a folder of images or of class sub-folders, or a .parquet file with columns image and label."""
    out: Path | None = None
    """Folder for report.json and reconstructions.png."""
    limit: int = 1_000_000
    """Use at most this many images, chosen at random."""

    def run(self) -> None:
        from nextscale.train.report import tokenizer_report
        from nextscale.train.tokenizer_run import evaluate_folder

        print(tokenizer_report(evaluate_folder(self.model, self.data, self.limit, self.out)))


@dataclass
class Adapt:
    """Carry a model over to other classes, another size or aspect, keeping what it has learnt; then fine-tune it."""

    model: Positional[Path]
    """Checkpoint folder."""
    out: Path
    """Folder to write."""
    classes: str | None = None
    """How many new classes (5), or their names; NAME=OLD starts from a class of the model: cat=281,dog,koi=goldfish."""
    scales: str | None = None
    """New sides of the token maps, coarse to fine: 1,2,3,4 or, for another aspect, 1x1,2x3,4x6."""
    seed: int = 0
    """Seed of the new class embeddings."""

    def run(self) -> None:
        from nextscale.checkpoints.adapt import adapt, parse_classes
        from nextscale.checkpoints.native import read_checkpoint, write_checkpoint

        checkpoint = read_checkpoint(self.model)
        classes = parse_classes(self.classes, checkpoint.config) if self.classes else None
        pyramid = Pyramid.parse(self.scales) if self.scales else None
        adapted = adapt(checkpoint, classes, pyramid, self.seed)
        write_checkpoint(self.out, adapted)
        print(f"wrote {self.out}: {adapted.config.summary()}")


@dataclass
class ImportOfficial:
    """Turn official VAR checkpoints (.pth or .safetensors) into a nextscale folder. All tensors are kept exactly."""

    vae: Path
    """The tokenizer, such as vae_ch160v4096z32.pth."""
    out: Path
    """Folder to write."""
    var: Path | None = None
    """The transformer, such as var_d16.pth; without it the folder holds a tokenizer alone."""
    scales: str | None = None
    """Sides of the token maps, coarse to fine (1,2,3,4 or 1x1,2x3,4x6), where the file does not say them."""
    heads: int | None = None
    """Attention heads, where the file does not say and they are not 64 wide."""
    cosine_lookup: bool = False
    """The tokenizer was trained with normalised codes (the official code's using_znorm)."""
    phi_ratio: float = 0.5
    """Share of the convolution in phi (the official code's quant_resi)."""
    class_names: Path | None = None
    """Text file with one class name per line, in label order."""

    def run(self) -> None:
        from nextscale.checkpoints.native import write_checkpoint
        from nextscale.checkpoints.official import import_official
        from nextscale.checkpoints.official_config import Hints

        hints = Hints(
            Pyramid.parse(self.scales) if self.scales else None,
            self.heads,
            self.phi_ratio,
            self.cosine_lookup,
            _lines(self.class_names) if self.class_names else (),
        )
        checkpoint = import_official(self.vae, self.var, hints)
        write_checkpoint(self.out, checkpoint)
        print(f"wrote {self.out}: {checkpoint.config.summary()}")


@dataclass
class ExportOfficial:
    """Write a nextscale folder as official VAR checkpoints; the suffix chooses .pth or .safetensors."""

    model: Positional[Path]
    """Checkpoint folder."""
    vae: Path | None = None
    """Tokenizer file to write."""
    var: Path | None = None
    """Transformer file to write."""

    def run(self) -> None:
        from nextscale.checkpoints.native import read_checkpoint
        from nextscale.checkpoints.official import export_official

        if self.vae is None and self.var is None:
            raise UserError("nothing to write: give --vae FILE, --var FILE, or both")
        export_official(read_checkpoint(self.model), self.vae, self.var)
        print("wrote " + " and ".join(str(p) for p in (self.vae, self.var) if p))


@dataclass
class Info:
    """Show parameters, FLOPs and memory per scale of a named model (var-d12 ... var-d36) or a checkpoint folder."""

    model: Positional[str]
    """Name or folder."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        import json

        from nextscale.info import as_text, describe

        facts = describe(self.model)
        print(json.dumps(facts, indent=2) if self.json else as_text(facts))


COMMANDS: dict[str, type] = {
    "quickstart": Quickstart,
    "sample": Sample,
    "reconstruct": Reconstruct,
    "edit": Edit,
    "adapt": Adapt,
    "tokenizer train": TokenizerTrain,
    "tokenizer evaluate": TokenizerEvaluate,
    "import-official": ImportOfficial,
    "export-official": ExportOfficial,
    "info": Info,
}


def parse_labels(text: str) -> list[str | None]:
    """ "3,7,none,cat" as ["3", "7", None, "cat"]; the pipeline knows which are names and which are indices."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"--labels '{text}' has an empty entry; write indices or names separated by commas: 3,7")
    return [None if part == "none" else part for part in parts]


def _say_enlarged(images: Sequence[Path], size: tuple[int, int]) -> None:
    """One line for each image that is smaller than the model's size (height, width)."""
    from nextscale.data.images import load_image

    for path in images:
        width, height = load_image(path).size
        if height < size[0] or width < size[1]:
            print(f"note: {path} is {width} x {height}, smaller than the model's {size[1]} x {size[0]}; it is enlarged")


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read class names from {path}: {error}") from error


def _write_outputs(  # type: ignore[no-untyped-def]
    images, out: Path, tokens_out: Path | None, images_out: Path | None, *, as_grid: bool = True
) -> None:
    """Write the picture and what --tokens-out and --images-out ask for; all replace older files together, or none."""
    from safetensors.torch import save_file

    from nextscale.files import replacing
    from nextscale.pictures import tile, write_image

    pictures = images.pil()
    names = [
        f"{i:05d}_{''.join(c if c.isalnum() else '_' for c in caption)}.png"
        for i, caption in enumerate(images.captions)
    ]
    singles = [images_out / name for name in names] if images_out else []
    tables = [tokens_out] if tokens_out else []
    with replacing(out, *tables, *singles) as (sheet, *drafts):
        write_image(tile(pictures, images.captions) if as_grid else pictures[0], sheet)
        if tables:
            save_file({"tokens": images.tokens.contiguous(), "images": images.tensor.contiguous()}, drafts.pop(0))
        for picture, draft in zip(pictures, drafts, strict=False):
            write_image(picture, draft)
