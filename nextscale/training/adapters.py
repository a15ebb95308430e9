"""Training of adapters (LoRA) and of new classes: what a run with `lora.rank` has instead of a whole model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nextscale.checkpoints import Checkpoint, build_modules
from nextscale.checkpoints.adapt import NewClass, make_class_embeddings, parse_classes
from nextscale.checkpoints.lora import Adapter, add_classes, compute_base_fingerprint, merge
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.classes import fold_name, list_names
from nextscale.config.lora import NEW_ROWS, LoraConfig
from nextscale.config.model import ModelConfig
from nextscale.data.classes import Classes, ClassMatch, match_classes
from nextscale.transformer.lora import add_adapters
from nextscale.transformer.var import VAR


@dataclass(frozen=True)
class AdapterRun:
    """A model that stays as it is, and what is trained beside it."""

    config: LoraConfig
    start: Checkpoint
    where: str
    """The folder of the model."""
    classes: tuple[str, ...]
    """The new classes."""
    fingerprint: str
    """Of the model."""

    @staticmethod
    def create(config: LoraConfig, start: Checkpoint, where: str, data: Classes) -> tuple[AdapterRun, ClassMatch]:
        """The run, and the classes of the data as those of the model and new ones.

        Classes of the data that the model has, by name, are those of the model; all others are new. UserError when
        there is nothing to train.
        """
        fingerprint, model = compute_base_fingerprint(start), start.config.transformer
        if model is not None and model.condition.kind != "class":
            if config.classes_only or config.keep:
                raise UserError(
                    f"{where} is not conditioned on classes alone, so there are none to add or to keep: give "
                    "--lora.keep 0, and no --lora.classes-only"
                )
            plain = ClassMatch(tuple(range(data.count)), ())
            labelled = model.condition.takes_labels
            match = match_classes(data, Classes.of_model(where, start.config)) if labelled else plain
            return AdapterRun(config, start, where, (), fingerprint), match
        known = Classes.of_model(where, start.config)
        names = known.names or tuple(map(str, range(known.count)))
        folded = {*map(fold_name, names)}
        new = tuple(name for name in data.names if fold_name(name) not in folded)
        if config.classes_only and not new:
            raise UserError(f"lora.classes_only trains the embeddings of new classes, and {data.where} has none")
        match = match_classes(data, Classes.of_data(where, (*names, *new)), subset=True)
        return AdapterRun(config, start, where, new, fingerprint), match

    @property
    def model(self) -> ModelConfig:
        """The config of the model with the new classes."""
        return add_classes(self.start.config, self.classes) if self.classes else self.start.config

    def build_transformer(self, seed: int) -> VAR:
        """The model in float32, frozen, with adapters and embeddings of new classes to train."""
        _, transformer = build_modules(self.start.config)
        assert transformer is not None, "Classes.of_model has checked it"
        transformer.load_state_dict({name: tensor.float() for name, tensor in self.start.transformer.items()})
        rows = self._start_classes(seed) if self.classes else None
        add_adapters(transformer, self.config, rows, make_generator(seed, "lora"))
        return transformer

    def _start_classes(self, seed: int) -> Tensor:
        """Initial embeddings of the new classes (classes, D), float32."""
        given = parse_classes(self.config.classes, self.start.config) if self.config.classes else ()
        sources = {fold_name(new.name): new for new in given}
        if unknown := sources.keys() - {*map(fold_name, self.classes)}:
            raise UserError(
                f"lora.classes names {list_names(sources[name].name for name in sorted(unknown))}, which is no new "
                f"class of the data; new are: {list_names(self.classes) or 'none'}"
            )
        classes = [sources.get(fold_name(name), NewClass(name)) for name in self.classes]
        return make_class_embeddings(self.start.transformer["condition.embedding.weight"].float(), classes, seed)[:-1]

    def take(self, trained: dict[str, Tensor]) -> Adapter:
        """The adapter of these trained parameters."""
        config = replace(self.config, classes="")
        return Adapter(config, self.classes, {"where": self.where, "fingerprint": self.fingerprint}, trained)

    def merge(self, adapter: Adapter) -> Checkpoint:
        """The model with the adapter in its weights."""
        return merge(self.start, [(adapter, 1.0)])

    def describe(self, transformer: VAR) -> str:
        """One line: what is trained."""
        counts = [sum(p.numel() for p in transformer.parameters() if p.requires_grad or every) for every in (0, 1)]
        layers = sum(name.endswith("lora_A") for name, _ in transformer.named_parameters())
        parts = [f"adapters of rank {self.config.rank} in {layers} layers"] if layers else []
        parts += (
            [f"the new classes {list_names(self.classes)}"] if NEW_ROWS in dict(transformer.named_parameters()) else []
        )
        return (
            f"trained are {' and '.join(parts)}: {counts[0]:,} of {counts[1]:,} parameters; {self.where} stays as it is"
        )
