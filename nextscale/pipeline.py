"""A whole generator in one object: load, sample, reconstruct, score, save.

pipeline = Pipeline.from_pretrained("my-model")
pipeline.sample([3, 7], cfg=1.5, seed=0).save("grid.png")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoints import Checkpoint, build_modules, build_on_meta
from nextscale.checkpoints.native import check_routers, find_folder, read_modules
from nextscale.common.devices import copy_to, find_device
from nextscale.common.errors import UserError
from nextscale.common.precision import LOW
from nextscale.common.rng import fold_seed, make_generator
from nextscale.config.condition import OTHERS, take_given
from nextscale.config.model import ModelConfig
from nextscale.config.sampling import Capture, SampleConfig, parse_count, parse_sampling
from nextscale.images import Images
from nextscale.sampling import build_sampler
from nextscale.sampling.sampler import LogitsProcessor, Sampler, ScaleStep, sample_images, sample_scales
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.var import VAR

if TYPE_CHECKING:
    from nextscale.backends.twins import Backend
    from nextscale.checkpoints.lora import Adapters
    from nextscale.common.sizes import Size
    from nextscale.conditions import Read
    from nextscale.config.initialization import InitConfig
    from nextscale.data.arrays import ImageInput, ImagesInput
    from nextscale.pyramid import Pyramid
    from nextscale.sampling.capturing import Capturing
    from nextscale.sampling.editing import Edit

Labels = Tensor | Sequence["int | str | None"] | int | str | None


class Pipeline:
    """Tokenizer and transformer with the methods that users call. `transformer` is None for a tokenizer alone."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, transformer: VAR | None):
        self.config, self.tokenizer, self._transformer = config, tokenizer.eval(), transformer
        if transformer is not None:
            transformer.eval()
        self._origin: dict[str, Any] = {}
        self._extras: dict[str, Tensor] = {}
        self._stored: dict[str, torch.dtype] = {}
        self._converted: dict[str, torch.dtype] = {}  # of all tensors when they were converted to 16 bits, else empty
        self._refiner: VAR | None = None
        self._refiner_source, self._refiner_labels = "", cast(Tensor | None, None)
        self._capture: Capture = "auto"
        self._capturing: Capturing | None = None
        self._backend: Backend = "plain"
        self._training, self._dtype = False, torch.float32
        self._folder: Path | None = None  # that it was loaded from
        self._profile, self._adapters = "", cast("Adapters | None", None)
        self.sampling = SampleConfig()  # of calls that give no config

    @classmethod
    def from_config(
        cls, config: ModelConfig, seed: int = 0, init: InitConfig | None = None, *, backend: Backend = "auto"
    ) -> Pipeline:
        """A new, untrained generator, initialised from `seed`. It can be trained, with fast modules too."""
        config.check_memory()
        with torch.random.fork_rng(devices=[]):  # convolutions draw from the global generator
            torch.manual_seed(fold_seed(seed, "tokenizer"))
            tokenizer, transformer = build_modules(config)
        if transformer is not None:
            from nextscale.config.initialization import InitConfig
            from nextscale.transformer.initialization import initialize_transformer

            initialize_transformer(transformer, init or InitConfig(), make_generator(seed, "transformer"))
        return cls(config, tokenizer, transformer).optimize(backend, training=True)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto",
        revision: str | None = None, token: str | None = None, backend: Backend = "auto", capture: Capture = "auto",
        profile: str = "", lora: Sequence[str] = (),
    ) -> Pipeline:  # fmt: skip
        """Load a checkpoint folder, or `owner/name` from the Hugging Face hub when no such folder exists.

        `dtype`: what the networks compute in, whatever is stored; auto: the fastest type that is right for the device
        and the model (`nextscale.common.precision`). `device`: auto, cpu, cuda, cuda:1, mps. `revision` (branch, tag
        or commit) and `token` are for the hub. `backend`: "auto" swaps modules for fast ones (`Pipeline.optimize`),
        for inference alone; "plain" leaves plain PyTorch modules, which can be trained. `capture`: as the method.
        `profile`: settings that `nextscale tune` found, by name. `lora`: as `load_lora`. UserError names the file and
        tensor at fault.
        """
        if capture != "auto":
            from nextscale.sampling.capturing import check_capture

            check_capture(capture, find_device(device))
        folder, settings = find_folder(source, revision, token), SampleConfig()
        if profile:
            from nextscale.config.profile import read_profile

            settings, dtype = read_profile(folder, profile).apply(dtype)
        checkpoint, modules = read_modules(folder, int8=True)
        check_routers(source, checkpoint)
        device = find_device(device)
        pipeline, computes = cls._around(checkpoint, modules), checkpoint.choose_dtype(dtype, device)
        pipeline.sampling, pipeline._folder, pipeline._profile = settings, folder, profile
        del checkpoint  # from here on a tensor that is converted or packed frees the original
        pipeline.to(device, computes).optimize(backend).capture(capture)
        return pipeline.load_lora(*lora) if lora else pipeline

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto",
        backend: Backend = "auto",
    ) -> Pipeline:  # fmt: skip
        """Build the modules around a checkpoint's tensors. Arguments as in `from_pretrained`; it can be trained."""
        device = find_device(device)
        pipeline = cls._around(checkpoint, build_on_meta(checkpoint.config))
        pipeline.to(device, checkpoint.choose_dtype(dtype, device))
        return pipeline.optimize(backend, training=True)

    @classmethod
    def _around(cls, checkpoint: Checkpoint, modules: tuple[Tokenizer, VAR | None]) -> Pipeline:
        """Modules on the meta device, filled with a checkpoint's tensors as they are."""
        tokenizer, transformer = modules
        tokenizer.load_state_dict(checkpoint.tokenizer, assign=True)
        if transformer is not None:
            transformer.load_state_dict(checkpoint.transformer, assign=True)
        pipeline = cls(checkpoint.config, tokenizer, transformer)
        tensors = {**checkpoint.tokenizer, **checkpoint.transformer}
        pipeline._stored = {name: tensor.dtype for name, tensor in tensors.items()}
        pipeline._origin, pipeline._extras = checkpoint.origin, checkpoint.extras
        pipeline._dtype = torch.int8 if checkpoint.is_int8 else torch.float32
        return pipeline

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Pipeline:
        """Move to a device and compute in `dtype`; the quantiser stays in float32. int8 cannot be turned back."""
        floats = decoder = dtype
        if torch.int8 in (dtype, self._dtype):
            from nextscale.backends.cpu.int8_decoder import quantise_generator

            floats, decoder = quantise_generator(self.transformer, self.tokenizer, dtype, torch.device(device))
        self._dtype = dtype
        self.tokenizer.to(device).set_compute_dtype(decoder)
        for model in filter(None, (self._transformer, self._refiner)):
            model.to(device, floats)
        self._converted = {}
        if dtype in LOW:  # of which fast modules may keep small ones in float32
            modules = filter(None, (self.tokenizer, self._transformer))
            self._converted = {name: t.dtype for module in modules for name, t in module.state_dict().items()}
        return self.optimize(self._backend, training=self._training)

    def optimize(self, backend: Backend = "auto", *, training: bool = False) -> Pipeline:
        """Swap modules for fast ones of this machine, see `nextscale.backends.twins`; "plain" changes nothing. Without
        `training` the pipeline is for inference alone; it can still be saved, moved and converted."""
        self._backend, self._training = backend, training
        if backend != "plain":
            from nextscale.backends import optimize

            for module in filter(None, (self.tokenizer, self._transformer)):
                optimize(module, backend, training=training)
        return self

    def load_lora(self, *sources: str | Path, weight: float = 1.0) -> Pipeline:
        """Add adapters to the weights, FOLDER or FOLDER:WEIGHT; one that is loaded gets its new weight. Their classes
        follow the model's. A refiner is to be given anew. UserError as `nextscale.checkpoints.lora.merge` raises."""
        from nextscale.derived import change_adapters

        return change_adapters(self, lambda adapters: adapters.add(map(str, sources), weight))

    def unload_lora(self, *sources: str | Path) -> Pipeline:
        """Remove these adapters, or all: the weights are those of the rest, or again the model's, bit for bit."""
        from nextscale.derived import change_adapters

        return change_adapters(self, lambda adapters: adapters.remove(map(str, sources)))

    def at(self, scales: str | Pyramid = "", size: Size = 0) -> Pipeline:
        """The same weights at other scales, such as "1,2,3x4,6x8", or for images of another `size` in pixels, (height,
        width) or the side of a square (docs/sizes.md). Without a refiner. UserError where the model has one size."""
        from nextscale.derived import resize_pipeline

        return resize_pipeline(self, scales, size)

    def refine_with(self, refiner: Pipeline) -> Pipeline:
        """Let another model, usually a smaller one, generate the scales from the setting `draft_scales` on (CoDe).

        UserError unless both share the tokenizer, the scales and, in any order, the classes."""
        from nextscale.data.classes import match_model_classes
        from nextscale.sampling.collaborative import check_refiner

        check_refiner(self.config, self.tokenizer, refiner.config, refiner.tokenizer)
        self._refiner_labels = match_model_classes(self.config, refiner.config, "the refiner")
        self._refiner, self._refiner_source = refiner.transformer, ""
        return self

    def load_refiner(self, settings: SampleConfig) -> VAR | None:
        """The refiner of these settings, loaded at its first use; or the one that `refine_with` was given."""
        if settings.refiner and settings.refiner != self._refiner_source:
            source, dtype = settings.refiner, self._dtype
            self.refine_with(Pipeline.from_pretrained(source, dtype=dtype, device=self.device, backend=self._backend))
            self._refiner_source = source
        return self._refiner if settings.draft_scales or settings.refiner else None

    def capture(self, mode: Capture = "on") -> Pipeline:
        """Run the transformer's steps as CUDA graphs, which is faster at small batches: see `sampling.capturing`.

        auto, as a new pipeline: on a GPU where that pays. on: always; on a CPU on fixed memory, without graphs.
        """
        self._capture = mode
        return self

    def to_checkpoint(self) -> Checkpoint:
        """The checkpoint to save. Tensors that were widened to compute get their stored dtype if nothing is lost. At
        another size (`at`) it is that of a model of this size, as `nextscale adapt` makes it."""
        from nextscale.derived import build_checkpoint

        return build_checkpoint(self)

    def save_pretrained(self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None) -> None:
        """Write a checkpoint folder and its card; with `push_to_hub`, upload it as `repo_id` (the folder's name)."""
        from nextscale.cards.saving import save_with_card

        name = (repo_id or Path(folder).name) if push_to_hub else ""
        save_with_card(Path(folder), self.to_checkpoint(), self._folder, upload_as=name)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload to the Hugging Face hub as `owner/name`, with a model card; return the address of the commit."""
        from nextscale.cards.saving import upload_with_card

        return upload_with_card(self.to_checkpoint(), self._folder, repo_id, private=private, token=token)

    @property
    def transformer(self) -> VAR:
        """The transformer; UserError for a tokenizer alone."""
        if self._transformer is None:
            raise UserError("this checkpoint is a tokenizer alone: it can reconstruct, but not sample")
        return self._transformer

    @property
    def dtype(self) -> torch.dtype:
        """The type of the networks' weights."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.tokenizer.quantizer.codebook.weight.device

    def sample(
        self, labels: Labels = None, config: SampleConfig | None = None, *, batch_size: int = 16, first_image: int = 0,
        growth: bool = False, progress: bool = False, logits_processors: Sequence[LogitsProcessor] = (),
        **overrides: Any,
    ) -> Images:  # fmt: skip
        """Generate one image for each label, or prompt, control picture or vector where the model takes those.

        `labels`: class indices, class names, or None for no label. Keywords for other conditions (docs/conditions.md),
        one value or one for each image: `prompts`, texts; `control`, pictures of the model's size; `vectors`; and
        `negative_prompts`, which guidance leads away from. Settings come from `config` (default: the pipeline's
        `sampling`) and keywords, its fields. Image i uses random stream (seed, first_image + i), so it does not depend
        on `batch_size`, to the last bit on a CPU with the default backend; official seeding makes one batch of all.
        `growth`: also decode what each scale leaves (`Images.growth`, `Images.animate`).

        cfg, temperature, top_k and top_p also take a list or a function of the scale. `logits_processors`: your own
        functions (logits_BNV, k) -> logits_BNV, applied after guidance and before temperature, top-k and top-p.
        """
        given, settings = take_given(overrides), self._parse_settings(config, overrides)
        values, negative, captions = self._read_condition(labels, given, settings)
        batch_size, first_image = parse_count("batch_size", batch_size, 1), parse_count("first_image", first_image)
        size = len(values) if settings.official_seeding else batch_size
        batches = []
        for i in tqdm(range(0, len(values), size), desc="sampling", unit="batch", disable=not progress):
            other = None if negative is None else negative[i : i + size]
            sampler = self._build_sampler(values[i : i + size], settings, first_image + i, logits_processors, other)
            batches.append(sample_images(sampler, growth=growth))
        tokens, images = torch.cat([b.tokens_BL for b in batches]), torch.cat([b.images_B3HW for b in batches])
        grown = tuple(torch.cat(parts).cpu() for parts in zip(*(b.growth for b in batches), strict=True))
        return Images(tokens.cpu(), images.cpu(), captions, growth=grown)

    def sample_scales(
        self, labels: Labels = None, config: SampleConfig | None = None, first_image: int = 0, *,
        records: bool = True, logits_processors: Sequence[LogitsProcessor] = (), **overrides: Any,
    ) -> Iterator[ScaleStep]:  # fmt: skip
        """As `sample` for one batch, yielding each scale as it is done, with the canvas that it leaves.

        `records`: whether the steps need them; captured graphs have none.
        """
        given, settings = take_given(overrides), self._parse_settings(config, overrides)
        values, negative, _ = self._read_condition(labels, given, settings)
        sampler = self._build_sampler(values, settings, first_image, logits_processors, negative, records=records)
        return sample_scales(sampler)

    def reconstruct(self, images: ImagesInput | Images) -> Images:
        """Encode and decode images: one or several paths, PIL images, arrays of uint8 or of floats in [0, 1].

        `nextscale.data.arrays` says which arrays are taken. An image of another size is resized on its short side and
        centre-cropped. Images are encoded one at a time, so that each gives the same tokens in every batch.
        """
        inputs, captions = self._load_images(images)
        tokens = self._encode_images(inputs)
        decoded = torch.cat([self.tokenizer.decode(t[None]) for t in tokens])
        return Images(tokens.cpu(), (decoded.cpu() + 1) / 2, captions)

    def edit(
        self, image: ImageInput, mask: ImageInput, label: int | str | None = None,
        config: SampleConfig | None = None, *, first_image: int = 0,
        logits_processors: Sequence[LogitsProcessor] = (), **overrides: Any,
    ) -> Images:  # fmt: skip
        """Generate the part of an image that `mask` does not keep.

        `mask`: an image, white where the image stays and black where it is generated anew, or an array (H, W) of the
        model's or the image's size with 1 and 0. `label`: the class to generate; None (the default) continues the
        image, for in-painting and out-painting. Other conditions, settings and processors as in `sample`. A mask that
        keeps everything gives the reconstruction, one that keeps nothing the sample of that seed.
        """
        from nextscale.data.arrays import read_masked
        from nextscale.sampling.editing import build_edit

        given, settings = take_given(overrides), self._parse_settings(config, overrides)
        nothing = self.transformer.condition.nothing(1)
        values, negative, captions = nothing, None, cast(tuple[str, ...], (self.caption(None),))
        if label is not None or given:
            values, negative, captions = self._read_condition(None if label is None else [label], given, settings)
        picture_3HW, mask_HW = read_masked(image, mask, self.config.image_size)
        edit = build_edit(mask_HW, self._encode_images(picture_3HW[None]), self.config)
        edited = sample_images(self._build_sampler(values, settings, first_image, logits_processors, negative, edit))
        return Images(edited.tokens_BL.cpu(), edited.images_B3HW.cpu(), captions)

    def encode(self, images: ImagesInput | Images) -> Tensor:
        """Tokens (B, L) of images, given as in `reconstruct`."""
        return self._encode_images(self._load_images(images)[0]).cpu()

    def score(self, images: ImagesInput | Images, labels: Labels = None, **given: Any) -> Tensor:
        """Log-likelihood in nats of the images' tokens given labels, or `given` as keywords of `sample`, per scale:
        (B, K), float32; images as in `encode`."""
        from nextscale.sampling.likelihood import compute_log_likelihood

        values = self._read_condition(labels, given)[0]
        tokens = self.encode(images).to(self.device)
        if len(tokens) != len(values):
            raise UserError(f"score needs one label per image; got {len(tokens)} images and {len(values)} labels")
        return compute_log_likelihood(self.tokenizer, self.transformer, tokens, values).cpu()

    def label_indices(self, labels: Labels) -> list[int | None]:
        """Labels as class numbers, None for no label; a text is read like that of `nextscale sample --labels`."""
        return self.config.index_labels(labels)

    def caption(self, value: int | None) -> str:
        """The caption of an image of this class, None for no label; empty where images have no classes."""
        return self.config.caption(value)

    def _read_condition(self, labels: Labels, given: dict[str, Any], settings: SampleConfig | None = None) -> Read:
        """Values of the condition, those of negative prompts or None, and captions."""
        if given or self.transformer.config.condition.kind in OTHERS:
            from nextscale.conditions import read_condition

            return read_condition(self, labels, given, settings)
        indices = self.label_indices(labels)
        if not indices:
            raise UserError("at least one label is needed; got none")
        return self.transformer.condition.parse(indices), None, tuple(map(self.caption, indices))

    def _parse_settings(self, config: SampleConfig | None, overrides: dict[str, Any]) -> SampleConfig:
        """The settings, with functions of the scale as lists and thresholds in place of a budget."""
        settings = parse_sampling(self.sampling if config is None else config, overrides, len(self.config.pyramid))
        if not settings.budget:
            return settings
        from nextscale.sampling.thresholds import resolve_budget

        return resolve_budget(settings, self._origin)

    def _build_sampler(
        self, values: Any, settings: SampleConfig, first_image: int, processors: Sequence[LogitsProcessor],
        negative: Any = None, edit: Edit | None = None, records: bool = False,
    ) -> Sampler:  # fmt: skip
        refiner, captured = self.load_refiner(settings), None
        if self._capture == "on" or (self._capture == "auto" and self.device.type == "cuda" and not records):
            from nextscale.sampling.capturing import Capturing

            self._capturing = self._capturing or Capturing()
            captured = self._capturing.choose(self._capture, self.transformer, settings, refiner, len(values))
        return build_sampler(
            self.tokenizer, self.transformer, values, settings, first_image=parse_count("first_image", first_image),
            negative=negative, edit=edit, refiner=refiner, refiner_labels=self._refiner_labels,
            logits_processors=processors, captured=captured,
        )  # fmt: skip

    def _load_images(self, images: ImagesInput | Images) -> tuple[Tensor, tuple[str, ...]]:
        """Images in [-1, 1] (B, 3, H, W) and a caption for each."""
        from nextscale.data.arrays import load_batch

        return load_batch(images.tensor if isinstance(images, Images) else images, self.config.image_size)

    def _encode_images(self, images_B3HW: Tensor) -> Tensor:
        """Tokens (B, L) of images in [-1, 1], on the model's device; one at a time."""
        return torch.cat([self.tokenizer.encode(copy_to(x_3HW[None], self.device)) for x_3HW in images_B3HW])
