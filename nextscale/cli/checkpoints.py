"""Commands that turn one checkpoint into another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from nextscale.cli.files import Adapters, Overwrite, Paths, list_folders, list_inputs
from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.parse import SEED_RULE, check_fields, is_seed
from nextscale.config.sparsify import SparsifyConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.pyramid import Pyramid

if TYPE_CHECKING:
    from nextscale.common.outputs import Input, Output


@dataclass
class Adapt:
    """Adapt a trained model to other classes, sizes, or a further condition. Fine-tune it afterwards."""

    model: Positional[Path]
    """Checkpoint folder."""
    out: Path
    """Folder to write, for `nextscale train --start`."""
    classes: str | None = None
    """Number of new classes (5), or their names. NAME=OLD starts from an old class: cat=281,dog,koi=goldfish."""
    scales: str | None = None
    """New sides of the token maps, coarse to fine: 1,2,3,4 or, for another aspect, 1x1,2x3,4x6."""
    control: Literal["", "edges", "low-resolution", "mask", "colours"] = ""
    """Also read a control picture: edges or a low resolution, which training computes; or a mask (1 channel) or colours
    (3), which examples made in Python give."""
    text: bool = False
    """Also read a caption, with a small text encoder that is trained along."""
    seed: int = 0
    """Seed of new class embeddings and of what reads a further condition."""
    overwrite: Overwrite = False

    def check(self) -> None:
        check_fields("", self, {SEED_RULE: is_seed(self.seed)})

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import CheckpointFolder

        return [CheckpointFolder("--out", self.out)], list_inputs(models={"MODEL": self.model})

    def run(self) -> None:
        from nextscale.checkpoints.adapt import adapt, parse_classes
        from nextscale.checkpoints.add_conditions import add_conditions
        from nextscale.checkpoints.native import read_checkpoint
        from nextscale.checkpoints.saving import write_checkpoint

        checkpoint = read_checkpoint(self.model)
        classes = parse_classes(self.classes, checkpoint.config) if self.classes else None
        pyramid = Pyramid.parse(self.scales) if self.scales else None
        adapted = adapt(checkpoint, classes, pyramid, self.seed)
        if parts := self._list_parts(adapted.config.image_size):
            adapted = add_conditions(adapted, parts, self.seed)
        write_checkpoint(self.out, adapted)
        print(f"wrote {self.out}: {adapted.config.summarize()}")

    def _list_parts(self, image_size: tuple[int, int]) -> dict[str, ConditionConfig]:
        """The further parts of the condition, by name."""
        parts = {"text": ConditionConfig(kind="text")} if self.text else {}
        if self.control:
            computed = self.control if self.control in ("edges", "low-resolution") else ""
            channels = 3 if self.control == "colours" else 1
            parts["control"] = ConditionConfig(
                kind="picture", control=computed, channels=channels, picture_size=image_size
            )
        return parts


@dataclass
class Upcycle:
    """Turn a dense model into a mixture of experts that computes the same (sparse upcycling). Train it afterwards.

    Every expert starts as a copy of the dense FFN; routers are initialised at random. Gates are divided by their sum
    (experts.renormalise), so the first outputs equal the dense model's. Works with the routers stmoe and smoe.
    """

    model: Positional[Path]
    """Checkpoint folder of a dense model."""
    out: Path
    """Folder to write, for `nextscale train --start`."""
    experts: ExpertsConfig = field(default_factory=lambda: ExpertsConfig(router="stmoe", renormalise=True))
    noise: float = 0.0
    """Normal noise on the copies, as a share of the standard deviation of each weight. The copies also diverge without
    it, because they see different tokens during training."""
    seed: int = 0
    """Seed of the routers and of the noise."""
    overwrite: Overwrite = False

    def check(self) -> None:
        check_fields("", self, {"noise must be 0 or more": self.noise >= 0, SEED_RULE: is_seed(self.seed)})

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import CheckpointFolder

        return [CheckpointFolder("--out", self.out)], list_inputs(models={"MODEL": self.model})

    def run(self) -> None:
        from nextscale.checkpoints.native import read_checkpoint
        from nextscale.checkpoints.saving import write_checkpoint
        from nextscale.checkpoints.upcycle import upcycle

        if not self.experts.renormalise:
            raise UserError("experts.renormalise must stay true: gates that sum to less than 1 would weaken every FFN")
        upcycled = upcycle(read_checkpoint(self.model), self.experts, self.seed, self.noise)
        write_checkpoint(self.out, upcycled)
        experts = f"{self.experts.count} experts, {self.experts.active} active"
        print(f"wrote {self.out}: {experts}; {upcycled.config.summarize()}")


@dataclass
class MergeLora:
    """Add adapters (LoRA) to the weights of their model, and write the result as a model."""

    model: Positional[Path]
    """Checkpoint folder of the model that the adapters were trained for."""
    lora: Adapters
    out: Path
    """Folder to write, a checkpoint for every command."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import CheckpointFolder

        models: Paths = {"MODEL": self.model, "--lora": list_folders(self.lora)}
        return [CheckpointFolder("--out", self.out)], list_inputs(models=models)

    def run(self) -> None:
        from nextscale.checkpoints.lora import Adapters
        from nextscale.checkpoints.native import read_checkpoint
        from nextscale.checkpoints.saving import write_checkpoint

        merged = Adapters(lambda: read_checkpoint(self.model)).add(self.lora).merge()
        write_checkpoint(self.out, merged)
        print(f"wrote {self.out}: {merged.config.summarize()}")


@dataclass
class Quantise:
    """Store a model with the linear layers of its transformer in 8 bits, a quarter of their float32 bytes.

    The folder can be sampled, scored and measured on a CPU, as the model itself with `--dtype int8`; it cannot be
    trained or converted.
    """

    model: Positional[Path]
    """Checkpoint folder."""
    out: Path
    """Folder to write, a checkpoint for `nextscale sample`."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import CheckpointFolder

        return [CheckpointFolder("--out", self.out)], list_inputs(models={"MODEL": self.model})

    def run(self) -> None:
        from nextscale.checkpoints.native import read_checkpoint
        from nextscale.checkpoints.quantise import quantise_checkpoint
        from nextscale.checkpoints.saving import write_checkpoint

        before = read_checkpoint(self.model)
        after = quantise_checkpoint(before)
        write_checkpoint(self.out, after)
        sizes = [sum(t.nbytes for t in c.transformer.values()) / 2**20 for c in (before, after)]
        print(f"wrote {self.out}: the transformer takes {sizes[1]:,.1f} instead of {sizes[0]:,.1f} MiB")


@dataclass
class Sparsify:
    """Make a trained model cheaper at its last scales (DMoE-VAR).

    Its FFNs are divided into experts, and each token runs only those that matter to it. Stages: tune, split, routers,
    thresholds; on request adapt before the last. Finished stages are not repeated, and an interrupted one is resumed.
    Then use `nextscale sample OUT --budget 0.8`, or --tau: an expert runs when its predicted norm is at least (1 - tau)
    times the largest.
    """

    model: Positional[Path]
    """Checkpoint folder."""
    out: Path
    """Folder to write: a checkpoint, sparsify.json and sparsify.png. Its stages/ can be deleted at the end."""
    settings: Annotated[SparsifyConfig, arg(name="")] = field(default_factory=SparsifyConfig)
    config: Path | None = None
    """YAML or JSON file with settings; options on the command line take precedence."""
    accept_changes: bool = False
    """Resume a training even though its settings have changed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""

    main_options: ClassVar[tuple[str, ...]] = (
        "model",
        "out",
        "data",
        "stages",
        "budget",
        "budgets",
        "expert-size",
        "scales",
        "tuning.epochs",
        "routers.epochs",
        "device",
    )

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common import contents
        from nextscale.common.outputs import RunFolder

        inputs = list_inputs(
            images={"--data": self.settings.data}, models={"MODEL": self.model}, files={"--config": self.config}
        )
        return [RunFolder("--out", self.out, (contents.SPARSIFY_RUN,))], inputs

    def run(self) -> None:
        from nextscale.common.distributed import init_distributed
        from nextscale.sparsify.report import summarize_report
        from nextscale.sparsify.run import sparsify
        from nextscale.training.report import report_interruption

        with report_interruption(self.out / "stages"), init_distributed(self.device) as world:
            report = sparsify(self.model, self.out, self.settings, world, accept_changes=self.accept_changes)
        if world.main:
            print(summarize_report(report, self.out))


@dataclass
class ImportOfficial:
    """Convert official VAR or M-VAR checkpoints (.pth or .safetensors) to a nextscale folder, bit for bit."""

    vae: Path
    """Tokenizer file, such as vae_ch160v4096z32.pth."""
    out: Path
    """Checkpoint folder to write, which every command takes."""
    var: Path | None = None
    """Transformer file, such as var_d16.pth or mvar_d16.pth. Without it the folder holds a tokenizer alone."""
    scales: str | None = None
    """Sides of the token maps, coarse to fine (1,2,3,4 or 1x1,2x3,4x6). Needed when the file does not hold them."""
    heads: int | None = None
    """Number of attention heads. Needed when the file does not hold it and heads are not 64 wide."""
    cosine_lookup: bool = False
    """The tokenizer was trained with normalised codes (the official code's using_znorm)."""
    phi_ratio: float = 0.5
    """Weight of the convolution in phi (the official code's quant_resi)."""
    class_names: Path | None = None
    """Text file with one class name per line, in label order."""
    overwrite: Overwrite = False

    def check(self) -> None:
        check_fields(
            "",
            self,
            {
                "heads must be 1 or more": self.heads is None or self.heads >= 1,
                "phi_ratio must lie in 0 to 1": 0 <= self.phi_ratio <= 1,
            },
        )

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import CheckpointFolder

        files: Paths = {"--vae": self.vae, "--var": self.var, "--class-names": self.class_names}
        return [CheckpointFolder("--out", self.out)], list_inputs(files=files)

    def run(self) -> None:
        from nextscale.checkpoints.official import import_official
        from nextscale.checkpoints.official_shapes import Hints
        from nextscale.checkpoints.saving import write_checkpoint

        hints = Hints(
            Pyramid.parse(self.scales) if self.scales else None,
            self.heads,
            self.phi_ratio,
            self.cosine_lookup,
            _read_lines(self.class_names) if self.class_names else (),
        )
        checkpoint = import_official(self.vae, self.var, hints)
        write_checkpoint(self.out, checkpoint)
        print(f"wrote {self.out}: {checkpoint.config.summarize()}")


@dataclass
class ExportOfficial:
    """Write a nextscale folder as official VAR or M-VAR checkpoints; the suffix chooses .pth or .safetensors."""

    model: Positional[Path]
    """Checkpoint folder."""
    vae: Path | None = None
    """Tokenizer file to write, .pth or .safetensors."""
    var: Path | None = None
    """Transformer file to write, .pth or .safetensors."""
    overwrite: Overwrite = False

    def list_files(self) -> tuple[list[Output], list[Input]]:
        from nextscale.common.outputs import WeightsFile

        given = (("--vae", self.vae), ("--var", self.var))
        outputs: list[Output] = [WeightsFile(option, path) for option, path in given if path is not None]
        return outputs, list_inputs(models={"MODEL": self.model})

    def run(self) -> None:
        from nextscale.checkpoints.native import read_checkpoint
        from nextscale.checkpoints.official import export_official

        if self.vae is None and self.var is None:
            raise UserError("nothing to write: give --vae FILE, --var FILE, or both")
        notes = export_official(read_checkpoint(self.model), self.vae, self.var)
        print("wrote " + " and ".join(str(p) for p in (self.vae, self.var) if p))
        for note in notes:
            print(f"note: {note}")


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read class names from {path}: {error}") from error
