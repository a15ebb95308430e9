"""Commands that use a model: sample, reconstruct, edit, info."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from nextscale.cli.files import (
    Adapters,
    ImageSize,
    Overwrite,
    Paths,
    Scales,
    Show,
    list_folders,
    list_inputs,
    list_terminal_needs,
)
from nextscale.cli.profiles import ProfileName
from nextscale.common.dtypes import Dtype, SamplingDtype
from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from nextscale.config.parse import check_fields
from nextscale.config.sampling import Capture, SampleConfig

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output
    from nextscale.images import Images
    from nextscale.pipeline import Pipeline


Backend = Literal["auto", "plain"]


@dataclass
class Sample:
    """Generate images from a model and write them as one grid."""

    model: Positional[str]
    """Checkpoint folder, or owner/name on the Hugging Face hub."""
    out: Path
    """The grid. The suffix chooses the format: .png, .jpg, .tif, ...; without one it is a PNG. .webp and .gif are
    animations that show what each scale adds."""
    labels: str = ""
    """Classes, separated by commas: names or numbers, or 'none' for no label. One image for each."""
    prompt: tuple[str, ...] = ()
    """Texts, for a model that reads them. One image for each."""
    prompt_file: Path | None = None
    """A text file with a prompt in each line, in place of prompts on the command line."""
    control: tuple[Path, ...] = ()
    """Control pictures (such as edges) of the model's size, for a model that reads them: one, or one for each image."""
    negative_prompt: str = ""
    """What guidance leads away from, for a model that reads texts."""
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings (cfg, top_k, top_p, temperature, seed, ...); options on the command line
    override it."""
    profile: ProfileName = ""
    lora: Adapters = ()
    scales: Scales = ""
    size: ImageSize = "0"
    tokens_out: Path | None = None
    """Also write a safetensors file with `tokens` (int64, images x all positions, coarse to fine), `images` (float32,
    B x 3 x H x W in 0 to 1) and, as `types` in its metadata, the `dtype` of the weights and what they are
    `computed_in`."""
    images_out: Path | None = None
    """Also write each image into this folder."""
    batch_size: int = 16
    """Batch size, 1 or more. On a CPU with the default backend images do not depend on it. --official-seeding makes one
    batch of all images."""
    decode_batch: int = 0
    """How many images of a batch are decoded at once; 0 = as many as fit into a GPU's memory. Images do not depend on
    it."""
    dtype: SamplingDtype = "auto"
    """float32, bfloat16, float16, or auto: the fastest that is right for the device and the model. int8: products in
    8 bits, faster still on a CPU, with slightly other images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    backend: Backend = "auto"
    """auto: the fast modules of the device. plain: plain PyTorch."""
    capture: Capture = "auto"
    """Run the steps as captured CUDA graphs, so that small batches do not wait for kernel launches. auto: on a GPU for
    up to 32 sequences (two an image with guidance), from the second batch of a size on."""
    show: Show = False
    overwrite: Overwrite = False

    main_options: ClassVar[tuple[str, ...]] = (
        "model", "out", "labels", "prompt", "prompt-file", "control", "negative-prompt", "cfg", "top-k", "top-p",
        "seed", "config", "profile", "lora", "scales", "size", "batch-size", "dtype", "device", "show",
    )  # fmt: skip

    def check(self) -> None:
        rules = {
            "batch_size must be 1 or more": self.batch_size >= 1,
            "decode_batch must be 0 or more": self.decode_batch >= 0,
        }
        check_fields("", self, rules)

    def list_needs(self) -> dict[str, str]:
        return list_terminal_needs(self.show)

    def list_files(self) -> tuple[list[Output], list[Input]]:
        models: Paths = {"MODEL": self.model, "--refiner": self.settings.refiner, "--lora": list_folders(self.lora)}
        files: Paths = {"--config": self.config, "--prompt-file": self.prompt_file}
        controls: Paths = {f"--control {path}": path for path in self.control}
        inputs = list_inputs(models=models, files={**files, **controls})
        return _list_outputs(self.out, self.tokens_out, self.images_out), inputs

    def run(self) -> None:
        from nextscale.common.animation import is_animated

        pipeline = _load_pipeline(self, capture=self.capture)
        pipeline.tokenizer.decode_batch = self.decode_batch
        labels = _parse_labels(pipeline, self.labels)
        prompts = read_prompts(self.prompt_file) if self.prompt_file else self.prompt
        given = _list_given(prompts, self.control, self.negative_prompt)
        if labels is None and not given and pipeline.config.transformer:
            raise UserError(f"what to draw is missing: {_describe_options(pipeline)}")
        growth, progress = is_animated(self.out), max(map(len, [labels or [], prompts, self.control])) > 1
        images = pipeline.sample(
            labels, self.settings, batch_size=self.batch_size, growth=growth, progress=progress, **given
        )
        _write_outputs(self, pipeline, images, self.images_out)
        print(f"wrote {len(images)} images to {self.out}")


@dataclass
class Reconstruct:
    """Encode and decode images, to judge the tokenizer's quality.

    Images of another size than the model's are resized to cover it and centre-cropped.
    """

    model: Positional[str]
    """Checkpoint folder, or owner/name on the Hugging Face hub."""
    images: Positional[tuple[Path, ...]]
    """Image files; a folder, a parquet file or a tar archive gives all its images, with or without
    labels."""
    out: Path
    """The reconstructions as one grid. The suffix chooses the format: .png, .jpg, .webp, ...; without one it is a
    PNG."""
    reading: Annotated[ReadConfig, arg(name="images")] = field(default_factory=ReadConfig)
    scales: Scales = ""
    size: ImageSize = "0"
    tokens_out: Path | None = None
    """Also write a safetensors file with `tokens` and `images`, as `nextscale sample` does."""
    images_out: Path | None = None
    """Also write each reconstruction into this folder."""
    dtype: Dtype = "auto"
    """float32, bfloat16, float16, or auto: the fastest that is right for the device and the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    backend: Backend = "auto"
    """auto: the fast modules of the device. plain: plain PyTorch."""
    show: Show = False
    overwrite: Overwrite = False

    def list_needs(self) -> dict[str, str]:
        return list_terminal_needs(self.show)

    def list_files(self) -> tuple[list[Output], list[Input]]:
        inputs = list_inputs(models={"MODEL": self.model}, images={"IMAGES": self.images})
        return _list_outputs(self.out, self.tokens_out, self.images_out), inputs

    def run(self) -> None:
        from nextscale.data.files import load_named_images

        pipeline = _load_pipeline(self)
        given = load_named_images(self.images, pipeline.config.image_size, self.reading)
        given.print_notes(pipeline.config.image_size)
        images = replace(pipeline.reconstruct(given.images), captions=tuple(Path(name).name for name in given.names))
        _write_outputs(self, pipeline, images, self.images_out)
        print(f"wrote {len(given.images)} reconstructions to {self.out}")


@dataclass
class Edit:
    """Generate part of an image anew: in-painting, out-painting, or another class inside the mask."""

    model: Positional[str]
    """Checkpoint folder, or owner/name on the Hugging Face hub."""
    image: Positional[Path]
    """Image file; one of another size than the model's is resized on its short side and centre-cropped."""
    mask: Path
    """Image of the same size: white stays, black is generated anew."""
    out: Path
    """The edited image. The suffix chooses the format: .png, .jpg, .webp, ...; without one it is a PNG."""
    label: str = "none"
    """Class to generate, name or number; 'none' continues the image."""
    prompt: str = ""
    """Text to generate, for a model that reads texts; without one the image is continued."""
    control: Path | None = None
    """Control picture (such as edges) of the model's size, for a model that reads one."""
    negative_prompt: str = ""
    """What guidance leads away from, for a model that reads texts."""
    settings: Annotated[SampleConfig, arg(name="")] = field(default_factory=SampleConfig)
    config: Path | None = None
    """YAML or JSON file with sampling settings; options on the command line override it."""
    profile: ProfileName = ""
    lora: Adapters = ()
    size: ImageSize = "0"
    tokens_out: Path | None = None
    """Also write a safetensors file with `tokens` and `images`, as `nextscale sample` does."""
    dtype: SamplingDtype = "auto"
    """float32, bfloat16, float16, or auto: the fastest that is right for the device and the model. int8: products in
    8 bits, faster still on a CPU, with slightly other images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    backend: Backend = "auto"
    """auto: the fast modules of the device. plain: plain PyTorch."""
    show: Show = False
    overwrite: Overwrite = False

    main_options: ClassVar[tuple[str, ...]] = (
        "model", "image", "mask", "out", "label", "prompt", "control", "negative-prompt", "cfg", "top-k", "top-p",
        "seed", "config", "profile", "lora", "size", "dtype", "device", "show",
    )  # fmt: skip

    def list_needs(self) -> dict[str, str]:
        return list_terminal_needs(self.show)

    def list_files(self) -> tuple[list[Output], list[Input]]:
        models: Paths = {"MODEL": self.model, "--refiner": self.settings.refiner, "--lora": list_folders(self.lora)}
        files: Paths = {
            "IMAGE": self.image, "--mask": self.mask, "--config": self.config, "--control": self.control
        }  # fmt: skip
        return _list_outputs(self.out, self.tokens_out), list_inputs(models=models, files=files)

    def run(self) -> None:
        from nextscale.data.files import load_named_images
        from nextscale.data.images import load_mask

        pipeline = _load_pipeline(self)
        labels = pipeline.config.parse_classes(self.label, "--label")
        if len(labels) != 1:
            raise UserError(f"--label takes one class; got '{self.label}'")
        load_named_images([self.image], pipeline.config.image_size).print_notes(pipeline.config.image_size)
        mask, resized = load_mask(self.mask, self.image, pipeline.config.image_size)
        if resized:
            print(f"note: {self.mask} is not of the size of {self.image} and was resized to it")
        if not (mask <= 0.5).any():
            print(f"note: {self.mask} keeps everything (it is white); the result is the reconstruction")
        elif not (mask > 0.5).any():
            print(f"note: {self.mask} keeps nothing (it is black); the result is a plain sample")
        prompts, control = [self.prompt] if self.prompt else [], [self.control] if self.control else []
        given = _list_given(prompts, control, self.negative_prompt)
        images = pipeline.edit(self.image, mask, labels[0], self.settings, **given)
        _write_outputs(self, pipeline, images)
        print(f"wrote {self.out}")


@dataclass
class Info:
    """Show parameters, FLOPs and memory per scale of a named model (var-d12 ... var-d36) or a checkpoint folder.

    With --verify: compare files with the digests that were written with them, to find damaged ones.
    """

    model: Positional[str]
    """Name or folder. With --verify any folder or file that nextscale wrote: a model, classifier, encoder, token cache
    or run, with all folders in it."""
    json: bool = False
    """Print JSON instead of a table."""
    verify: bool = False
    """Read all weights, shards and training states, and name those that do not match their digests."""
    accept_changes: bool = False
    """Record the digests of a model's files anew, after you changed its config.json or weights on purpose."""

    def run(self) -> None:
        import json

        if self.accept_changes:
            from nextscale.checkpoints.verify import accept_changes

            print(f"recorded the digests of {', '.join(accept_changes(Path(self.model)))} in {self.model}/config.json")
        if self.verify:
            from nextscale.checkpoints.verify import verify

            verify(Path(self.model))
        if self.verify or self.accept_changes:
            return
        from nextscale.info import as_text, describe

        facts = describe(self.model)
        print(json.dumps(facts, indent=2) if self.json else as_text(facts))


def _load_pipeline(command: Sample | Reconstruct | Edit, capture: Capture = "auto") -> Pipeline:
    """The command's model, at its size, with a note on its type where that was chosen, or is not what computes."""
    from nextscale.common.precision import describe_sampling_dtype
    from nextscale.common.sizes import parse_size
    from nextscale.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(
        command.model, dtype=command.dtype, device=command.device, backend=command.backend, capture=capture,
        lora=getattr(command, "lora", ()),
    )  # fmt: skip
    note = describe_sampling_dtype(command.dtype, pipeline.dtype, pipeline.device, fast=command.backend != "plain")
    if note:
        print(f"note: {note}")
    return pipeline.at(getattr(command, "scales", ""), parse_size("--size", command.size))


def _parse_labels(pipeline: Pipeline, labels: str) -> Any:
    """The classes of --labels; None where it is not given. Of a model without classes as they are, to be refused."""
    if not labels:
        return None
    takes = pipeline.transformer.config.condition.takes_labels
    return pipeline.config.parse_classes(labels, "--labels") if takes else labels


def read_prompts(path: Path) -> list[str]:
    """The lines of a file of prompts; UserError when it has none."""
    from nextscale.common.reading import read_text

    prompts = read_text(path, 2**24).splitlines()
    if not prompts:
        raise UserError(f"{path} holds no prompts: give one in each line")
    return prompts


def _list_given(prompts: Sequence[str], control: Sequence[Path], negative_prompt: str) -> dict[str, Any]:
    """What is given beside labels, by the keywords of `Pipeline.sample`."""
    given = {"prompts": list(prompts), "control": list(control), "negative_prompts": negative_prompt}
    return {name: value for name, value in given.items() if value}


def _describe_options(pipeline: Pipeline) -> str:
    """Which options a model takes, for a message."""
    condition = pipeline.transformer.config.condition
    options = {"text": "--prompt", "picture": "--control", "vector": "vectors in Python"}
    names = dict.fromkeys(options.get(part.kind, "--labels") for part in condition.list_parts().values())
    return f"this model is conditioned on {condition.describe()}, so give {' or '.join(names)}"


def _list_outputs(out: Path, tokens_out: Path | None, images_out: Path | None = None) -> list[Output]:
    """The outputs that a command declares."""
    from nextscale.common.outputs import PictureFile, PicturesFolder, TokensFile

    outputs: list[Output] = [PictureFile("--out", out)]
    outputs += [TokensFile("--tokens-out", tokens_out)] if tokens_out else []
    return outputs + ([PicturesFolder("--images-out", images_out)] if images_out else [])


def _write_outputs(
    command: Sample | Reconstruct | Edit, pipeline: Pipeline, images: Images, images_out: Path | None = None
) -> None:
    """Write --out and what --tokens-out and --images-out ask for. Older files are replaced together, or none."""
    from safetensors.torch import save_file

    from nextscale.common.files import write_atomically
    from nextscale.common.pictures import write_image
    from nextscale.common.precision import find_sampled, get_name

    pictures, name = images.pil(), f"nextscale {type(command).__name__.lower()}"
    picture = pictures[0] if isinstance(command, Edit) else images.grid()
    names = [
        f"{i:05d}_{''.join(c if c.isalnum() else '_' for c in caption)}.png"
        for i, caption in enumerate(images.captions)
    ]
    singles = [images_out / name for name in names] if images_out else []
    tables = [command.tokens_out] if command.tokens_out else []
    with write_atomically(command.out, *tables, *singles) as (sheet, *drafts):
        if images.growth:
            images.animate().write(sheet, name)
        else:
            write_image(picture, sheet, name)
        if tables:
            computed = find_sampled(pipeline.dtype, pipeline.device, fast=command.backend != "plain")
            types = {"dtype": get_name(pipeline.dtype), "computed_in": get_name(computed)}
            about = {"types": json.dumps(types)}  # safetensors writes several entries in any order
            tensors = {"tokens": images.tokens.contiguous(), "images": images.tensor.contiguous()}
            save_file(tensors, drafts.pop(0), about)
        for single, draft in zip(pictures, drafts, strict=False):
            write_image(single, draft, name)
    if command.show:
        from nextscale.common.terminal import show

        show(picture)
