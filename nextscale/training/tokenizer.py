"""`nextscale tokenizer train` and `nextscale tokenizer evaluate`.

The losses are VQGAN's, around VAR's residual quantizer: VAR published the quantizer's class but not its training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nextscale.backends import optimize
from nextscale.checkpoints import Checkpoint, build_modules
from nextscale.checkpoints.native import TOKENIZER, read_checkpoint
from nextscale.checkpoints.parts import load_tokenizer
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.checkpoints.verify import list_digests
from nextscale.common.devices import find_device
from nextscale.common.digest import add_digest
from nextscale.common.distributed import World
from nextscale.common.files import write_json
from nextscale.common.fingerprint import fingerprint_path
from nextscale.common.pictures import save_grid
from nextscale.common.rng import fold_seed
from nextscale.common.sizes import shorten_size
from nextscale.config.data import ReadConfig
from nextscale.config.model import ModelConfig
from nextscale.config.tokenizer_training import (
    CodebookConfig,
    TokenizerLossConfig,
    TokenizerRunConfig,
    derive_pyramid,
)
from nextscale.data.examples import Batch, Examples
from nextscale.data.parts import choose_part
from nextscale.evaluation.metrics.codebook import CodebookUsage, count_codes
from nextscale.evaluation.metrics.lpips import Lpips
from nextscale.evaluation.metrics.reconstruction import psnr, ssim
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.codebook import CodebookLearner
from nextscale.tokenizer.discriminator import PatchDiscriminator, compute_adaptive_weight, compute_hinge_loss
from nextscale.tokenizer.tokenizer import Tokenizer, scale_to_unit
from nextscale.training.engine.log import Values
from nextscale.training.engine.task import Task
from nextscale.training.open_run import (
    MainProcessCallbacks,
    load_test_images,
    open_image_run,
    plot_log,
    read_batches,
    resolve_precision,
)

_BATCH, _SHOWN_IMAGES, _VALIDATION_IMAGES = 100, 8, 500
_SSIM_WINDOW = 11


class TokenizerTask(Task):
    """Reconstruction, codebook, commitment, and optional perceptual and adversarial losses on uint8 images.

    The adversarial loss is weighted by gradients of the micro-batch (as in VQGAN), so with it the result depends on
    how a batch is divided.
    """

    name = "tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        examples: Examples,
        losses: TokenizerLossConfig | None = None,
        codebook: CodebookConfig | None = None,
    ):
        super().__init__()
        self.tokenizer, self.examples = tokenizer, examples
        self.losses, self.codebook = losses or TokenizerLossConfig(), codebook or CodebookConfig()
        self.tokens_per_example = tokenizer.pyramid.length
        # a phi may serve no scale of this pyramid
        self.leaves_parameters_unused = len(set(tokenizer.quantizer.phi_of_scale)) < len(tokenizer.quantizer.phi)
        decay = self.codebook.ema_decay if self.codebook.update == "ema" else None
        self.learner = CodebookLearner(tokenizer.quantizer, decay, self.codebook.revive_below)
        self.lpips = None
        if self.losses.lpips > 0:
            self.lpips = Lpips.from_files(Path(self.losses.lpips_vgg), Path(self.losses.lpips_linear))
        self.trained: nn.Module = nn.ModuleDict({"tokenizer": tokenizer, "learner": self.learner})
        self.discriminator = None
        if self.losses.adversarial > 0:
            height, width = (side * tokenizer.config.downsampling for side in tokenizer.pyramid.last)
            PatchDiscriminator.check_size((height, width), self.losses.discriminator_layers)
            self.discriminator = PatchDiscriminator(
                self.losses.discriminator_channels, self.losses.discriminator_layers
            )
            self.trained["discriminator"] = self.discriminator
            self.micro_batch_matters = "the adversarial loss is weighted by the gradients of each (as in VQGAN)"

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """How many scales each image is decoded from, with scale dropout."""
        share, scales = self.codebook.scale_dropout, len(self.tokenizer.pyramid)
        if not share:
            return {}
        drop_B, kept_B = torch.rand(count, generator=rng) < share, torch.randint(1, scales + 1, (count,), generator=rng)
        return {"decoded_scales": torch.where(drop_B, kept_B, scales)}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image_B3HW = scale_to_unit(batch["image"])
        decoded_B3HW, quantized = self.tokenizer(image_B3HW, noise.get("decoded_scales"))
        l1, l2 = F.l1_loss(decoded_B3HW, image_B3HW), F.mse_loss(decoded_B3HW, image_B3HW)
        loss = self.losses.l1 * l1 + self.losses.l2 * l2
        scalars = {"l1": l1.detach(), "vq": quantized.loss.detach()}
        if self.lpips is not None:
            perceptual = self.lpips(decoded_B3HW, image_B3HW).mean()
            loss, scalars["lpips"] = loss + self.losses.lpips * perceptual, perceptual.detach()
        if self.discriminator is not None:
            adversarial, scalars["discriminator"] = self._compute_adversarial_loss(
                self.discriminator, loss, image_B3HW, decoded_B3HW, step
            )
            loss = loss + adversarial
        config = self.tokenizer.config
        counts_KV = count_codes(quantized.tokens_BL, self.tokenizer.pyramid, config.vocab_size)
        self.learner.observe(quantized, counts_KV)
        scalars["codes used"] = (counts_KV.sum(dim=0) > 0).float().mean()
        return loss + quantized.loss, scalars

    def _compute_adversarial_loss(
        self, discriminator: PatchDiscriminator, reconstruction: Tensor, image_B3HW: Tensor, decoded_B3HW: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sum of both adversarial losses, and the discriminator's alone.

        The discriminator's loss has no gradient to the decoder, and the decoder's none to the discriminator.
        """
        own = compute_hinge_loss(discriminator(image_B3HW), discriminator(decoded_B3HW.detach()))
        if step < self.losses.adversarial_start:
            return own, own.detach()
        discriminator.requires_grad_(False)
        decoder_loss = -discriminator(decoded_B3HW).mean()
        discriminator.requires_grad_(True)
        last_layer = self.tokenizer.decoder.conv_out.weight
        weight = self.losses.adversarial * compute_adaptive_weight(reconstruction, decoder_loss, last_layer)
        return own + weight * decoder_loss, own.detach()

    def fast_modules(self) -> list[nn.Module]:
        return [self.tokenizer]

    def explain_missing_gradient(self, name: str) -> str | None:
        quantizer = self.tokenizer.quantizer
        unused = set(range(len(quantizer.phi))) - set(quantizer.phi_of_scale)
        if name in {f"tokenizer.quantizer.phi.{i}" for i in unused}:
            return "it serves no scale"
        # the hinge losses of real and decoded patches pull the last bias equally until a patch is beyond the margin
        is_last_bias = self.discriminator is not None and name == f"discriminator.{self.discriminator.last_bias}"
        return "" if is_last_bias else None

    def discard_step(self) -> None:
        self.learner.discard()

    def after_step(self, step: int, rng: torch.Generator, world: World) -> None:
        """Update the codebook's moving averages and revive codes, from the complete batch of this step."""
        revive = self.codebook.revive_every and (step + 1) % self.codebook.revive_every == 0
        self.learner.update(world, rng if revive else None)


def train_tokenizer(
    config: TokenizerRunConfig, data: str, folder: Path, world: World | None = None, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Train a tokenizer on `data` into `folder`, a checkpoint of a tokenizer alone; return its final evaluation.

    Beside the checkpoint: best/ (the one with the highest held-out PSNR), reconstructions.png (new at every save),
    curves.png, evaluation.json, log.jsonl. A second call with the same folder resumes an interrupted run. Raises
    UserError and Interrupted as `engine.loop.train` does, and UserError naming what differs from an earlier run's
    settings, unless `accept_changes`.
    """
    world = world or World()
    config = resolve_precision(config, folder, world)
    start = read_checkpoint(Path(config.start)) if config.start else None
    codes = start.config.tokenizer if start else config.tokenizer
    model = ModelConfig(_choose_pyramid(config, start), codes, None)
    run, examples, held_out, _ = open_image_run(
        folder, data, config, model.image_size, world, accept_changes=accept_changes, about=model.summarize(),
        other_inputs=_list_inputs(config),
    )  # fmt: skip
    tokenizer = load_tokenizer(start, model) if start else _create_tokenizer(model, config.train.seed)
    with torch.random.fork_rng(devices=[]):  # the discriminator's weights follow from the seed, too
        torch.manual_seed(fold_seed(config.train.seed, "discriminator"))
        task = TokenizerTask(tokenizer, examples, config.losses, config.codebook)
    run.train(task, config.train, _Callbacks(model, task, held_out, folder, world), config.images.max_unreadable)
    if not world.main:
        return {}
    report = evaluate_tokenizer(tokenizer, held_out)
    write_json(folder / "evaluation.json", report)
    plot_log(folder, task.name, {name: {name: name} for name in ("loss", "psnr_db", "perplexity", "usage")})
    return report


def _list_inputs(config: TokenizerRunConfig) -> dict[str, Any]:
    """The networks of the perceptual loss, where it is used."""
    if config.losses.lpips <= 0:
        return {}
    names = {"lpips_vgg": config.losses.lpips_vgg, "lpips_linear": config.losses.lpips_linear}
    return {name: fingerprint_path(path) for name, path in names.items()}


class _Callbacks(MainProcessCallbacks):
    def __init__(self, model: ModelConfig, task: TokenizerTask, held_out: Examples, folder: Path, world: World):
        super().__init__(folder, world)
        self.model, self.task, self.held_out = model, task, held_out

    def measure_model(self) -> Values:
        report = evaluate_tokenizer(self.task.tokenizer, self.held_out, _VALIDATION_IMAGES)
        values: Values = {name: report[name] for name in ("psnr_db", "perplexity", "usage")}
        return values | {"revived": int(self.task.learner.revived), "validation_loss": -report["psnr_db"]}

    def write_model(self, folder: Path, step: int) -> None:
        write_checkpoint(folder, Checkpoint(self.model, dict(self.task.tokenizer.state_dict()), {}))
        if folder == self.folder:
            draw_reconstructions(self.task.tokenizer, self.held_out, folder / "reconstructions.png")


def _choose_pyramid(config: TokenizerRunConfig, start: Checkpoint | None) -> Pyramid:
    """The start checkpoint's pyramid, unless the config asks for another one."""
    if start is None:
        return derive_pyramid(config.image_size, config.tokenizer.downsampling, config.scales)
    side = shorten_size(start.config.image_size)
    if not config.scales and config.image_size in (0, side):
        return start.config.pyramid
    default = side if isinstance(side, int) else 32
    return derive_pyramid(config.image_size, start.config.tokenizer.downsampling, config.scales, default)


def _create_tokenizer(model: ModelConfig, seed: int) -> Tokenizer:
    """A new tokenizer, whose weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, "tokenizer"))
        return build_modules(model)[0]


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer, examples: Examples, limit: int = 10**9, *, per_scale: bool = False
) -> dict[str, Any]:
    """PSNR and SSIM (means of per-image values), codebook usage and perplexity, over all scales and per scale.

    `per_scale`: also the PSNR of images decoded from the scales up to each one.
    """
    use = CodebookUsage.empty(tokenizer.pyramid, tokenizer.config.vocab_size)
    psnrs, ssims, count = list[Tensor](), [], min(len(examples), limit)
    batches = read_batches(examples, count, _BATCH, tokenizer.quantizer.codebook.weight.device)
    total = -(-count // _BATCH)
    for batch in tqdm(batches, desc="evaluating", unit="batch", total=total, disable=total < 20):
        image_B3HW = scale_to_unit(batch["image"])
        tokens_BL = tokenizer.encode(image_B3HW)
        use.add(tokens_BL, tokenizer.pyramid)
        canvases, target = list(tokenizer.build_canvases(tokens_BL)), (image_B3HW + 1) / 2
        decoded = [(tokenizer.decode_canvas(c) + 1) / 2 for c in canvases[0 if per_scale else -1 :]]
        psnrs.append(torch.stack([psnr(image, target) for image in decoded], dim=1))
        if min(image_B3HW.shape[-2:]) >= _SSIM_WINDOW:
            ssims.append(ssim(decoded[-1], target))
    psnr_K = torch.cat(psnrs).mean(dim=0).tolist()
    report: dict[str, Any] = {"images": count, "psnr_db": psnr_K[-1]}
    if per_scale:
        report["psnr_db_per_scale"] = psnr_K
    if ssims:
        report["ssim"] = float(torch.cat(ssims).mean())
    return report | use.report() | {"scales": str(tokenizer.pyramid)}


@torch.no_grad()
def draw_reconstructions(tokenizer: Tokenizer, examples: Examples, path: Path) -> None:
    """A picture: some images, and below each its reconstructions from the scales up to k, coarse to fine."""
    images = examples.fetch(range(min(len(examples), _SHOWN_IMAGES)), None)["image"]
    image_B3HW = scale_to_unit(images).to(tokenizer.quantizer.codebook.weight.device)
    rows: list[Tensor] = [image_B3HW]
    rows += [tokenizer.decode_canvas(canvas) for canvas in tokenizer.build_canvases(tokenizer.encode(image_B3HW))]
    names = ["image"] + [f"to {h}x{w}" for h, w in tokenizer.pyramid.sides]
    captions = [name for name in names for _ in range(len(image_B3HW))]
    save_grid((torch.cat(rows).cpu() + 1) / 2, captions, path, columns=len(image_B3HW))


def evaluate_folder(
    folder: Path, data: str, limit: int, out: Path | None, reading: ReadConfig | None = None, device: str = "auto",
    *, per_scale: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the tokenizer of a checkpoint folder on a data set; write report.json and a picture to `out`."""
    place = find_device(device)
    checkpoint = read_checkpoint(folder)
    model = dataclasses.replace(checkpoint.config, transformer=None, class_names=())
    tokenizer = load_tokenizer(checkpoint, model).to(place).eval()
    optimize(tokenizer)
    images = load_test_images(data, model.image_size, limit, reading)
    report = {"data": data, **evaluate_tokenizer(tokenizer, images.to_examples(), per_scale=per_scale)}
    report["model_weights"] = list_digests(folder, [TOKENIZER])
    if out is not None:
        write_json(out / "report.json", add_digest(report))
        shown = images.select(choose_part(len(images), _SHOWN_IMAGES, images.labels_B))
        draw_reconstructions(tokenizer, shown.to_examples(), out / "reconstructions.png")
    return report
