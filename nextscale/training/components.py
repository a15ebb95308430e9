"""The components of a run of `nextscale train`: data, tokenizer, transformer and guidance, which must fit together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nextscale.checkpoints import Checkpoint, build_modules
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.parts import load_tokenizer
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.classes import quote_name
from nextscale.config.data import DataConfig
from nextscale.config.idle import describe_idle, list_differences
from nextscale.config.model import ModelConfig
from nextscale.config.parse import reset_derived, to_dict
from nextscale.config.transformer import TransformerConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import CachedExamples, TokenCache, fingerprint_tokenizer, is_token_cache
from nextscale.data.cached_control import check_control
from nextscale.data.classes import Classes, ClassMatch, match_classes, read_trained_classes, relabel
from nextscale.data.examples import Examples
from nextscale.data.sizes import join_sizes, open_sizes
from nextscale.encoders.load import load_encoder
from nextscale.encoders.patches import PatchEncoder
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.text import choose_text, read_text_encoder
from nextscale.transformer.initialization import initialize_transformer
from nextscale.transformer.var import VAR

if TYPE_CHECKING:
    from nextscale.training.adapters import AdapterRun

_LISTED_CLASSES = 20


@dataclass(frozen=True)
class Components:
    """What a run works with."""

    model: ModelConfig
    tokenizer: Tokenizer
    tokenizer_weights: dict[str, Tensor]
    transformer: VAR
    examples: Examples
    held_out: Examples
    encoder: PatchEncoder | None
    """The encoder of semantic guidance, where the examples hold no features."""
    adapters: AdapterRun | None = None
    """Where adapters are trained, the model that they belong to."""

    def list_inputs(self, config: RunConfig) -> dict[str, Any]:
        """What every step of the run depends on besides its settings. Not the start checkpoint's transformer, unless
        adapters are trained: training has changed it after the first step."""
        tokenizer = {"where": config.start or config.tokenizer, "weights": fingerprint_tokenizer(self.tokenizer)}
        inputs = {"data": self.examples.inputs, "tokenizer": tokenizer}
        if self.encoder is not None:
            inputs["encoder"] = {"where": config.loss.encoder, "weights": self.encoder.fingerprint()}
        if self.adapters is not None:
            inputs["start"] = {"where": config.start, "weights": self.adapters.fingerprint}
        return inputs

    def add_model_samples(self, config: RunConfig, folder: Path, world: World) -> Components:
        """With samples of the start checkpoint among the examples, where adapters are trained on them, too."""
        if self.adapters is None or not (config.lora.rank and config.lora.keep):
            return self
        from nextscale.training.preservation import add_model_samples

        examples = add_model_samples(
            self.examples, self.adapters.start, self.tokenizer, config.lora.keep, len(self.adapters.classes),
            config.train.seed, folder, world, views=config.images.flip or config.images.random_crop,
        )  # fmt: skip
        return dataclasses.replace(self, examples=examples)


def load_components(config: RunConfig, world: World, folder: Path | None = None) -> Components:
    """Load or create the components of a run. Raises UserError when they do not fit together.

    `folder`: the run's, whose model, where there is one, decides the order of the classes.
    """
    checkpoint = read_checkpoint(Path(config.start or config.tokenizer))
    if config.scales and config.tokenizer:
        checkpoint.config = dataclasses.replace(checkpoint.config, pyramid=Pyramid.parse(config.scales))
    tokenizer = load_tokenizer(checkpoint, checkpoint.config)
    weights = checkpoint.tokenizer | {"quantizer.usage_KV": tokenizer.quantizer.usage_KV}
    pyramids = config.sizes.list_pyramids(checkpoint.config.pyramid)
    opened = open_sizes(
        config.data, checkpoint.config, pyramids, tokenizer, config.images, config.train.seed,
        choose_text(config, checkpoint),
    )  # fmt: skip
    names = opened[0][2]
    adapters, match = _match_classes(config, checkpoint, folder, names)
    if world.main:
        match.print_note()
    parts = [relabel(examples, match) for examples, _, _ in opened]
    held_parts = [relabel(held_out, match) for _, held_out, _ in opened]
    if config.loss.shuffle:
        parts, held_parts = ([_shuffle_features(part, config) for part in each] for each in (parts, held_parts))
    encoder, width = _load_guidance(config, parts[0], world)
    model = _build_config(config, checkpoint, match.names, width) if adapters is None else adapters.model
    model = read_text_encoder(model, config, parts[0])
    if isinstance(parts[0], CachedExamples) and model.transformer is not None:
        check_control(model.transformer.condition, parts[0].limits.control, config.data)
    examples, held_out = join_sizes(parts, held_parts, pyramids, checkpoint.config.pyramid, config.train.batch_size)
    if adapters is None:
        transformer = _build_transformer(config, model, checkpoint.transformer)
    else:
        transformer = adapters.build_transformer(config.train.seed)
    if world.main:
        for note in _list_overruled(config, checkpoint.config.transformer):
            print(f"note: {note}")
        print(f"{config.data}: {len(examples)} examples to train on, {len(held_out)} held out; {model.summarize()}")
        if adapters is not None:
            print(adapters.describe(transformer))
    return Components(model, tokenizer, weights, transformer, examples, held_out, encoder, adapters)


def _list_overruled(config: RunConfig, started: TransformerConfig | None) -> list[str]:
    """Sentences about settings that have no effect because the start checkpoint or the token cache has other ones."""
    notes = []
    if config.start and started is not None:
        mine, theirs, default = (reset_derived(c) for c in (config.transformer, started, TransformerConfig()))
        given = list_differences(mine, default, "transformer.")
        names = [name for name in list_differences(mine, theirs, "transformer.") if name in given]
        names = [n for n in names if not n.startswith(("transformer.condition.", "transformer.alignment."))]
        notes += [describe_idle(names, f"the transformer is that of {config.start}")] if names else []
    if is_token_cache(Path(config.data)):
        made = TokenCache(Path(config.data)).head.get("images")
        given = list_differences(config.images, DataConfig(), "images.")
        mine = to_dict(config.images)
        names = [n for n in given if isinstance(made, dict) and made.get(n.split(".")[1]) != mine[n.split(".")[1]]]
        reason = f"{config.data} is a token cache, made with other images settings; give them to `nextscale tokenize`"
        notes += [describe_idle(names, reason)] if names else []
    return notes


def _match_classes(
    config: RunConfig, checkpoint: Checkpoint, folder: Path | None, names: tuple[str, ...]
) -> tuple[AdapterRun | None, ClassMatch]:
    """The classes of the data, `names`, matched with those of the start checkpoint, or of the run that is resumed; with
    the adapters to train, if any. Without classes in the condition the model has no names for them, and labels stay as
    they are."""
    data = Classes.of_data(config.data, names)
    model = checkpoint.config.transformer if config.start else config.transformer
    unlabelled = model is not None and not model.condition.takes_labels
    if unlabelled and not config.lora.on:
        return None, ClassMatch(tuple(range(len(names))), ())
    if not config.start:
        known = read_trained_classes(folder) if folder else None
        return None, match_classes(data, known or data)
    if checkpoint.config.transformer is None:
        raise UserError(f"{config.start} is a tokenizer alone: give it as --tokenizer to train a new transformer")
    _check_static(config, checkpoint.config.transformer)
    if config.lora.on:
        from nextscale.training.adapters import AdapterRun

        return AdapterRun.create(config.lora, checkpoint, config.start, data)
    known = Classes.of_model(config.start, checkpoint.config)
    try:
        return None, match_classes(data, known)
    except UserError as error:
        quoted = [(name, quote_name(name)) for name in names]
        classes = ",".join(f"{entry}={entry}" if name in known.names else entry for name, entry in quoted)
        advice = len(names) if known.unnamed or len(names) > _LISTED_CLASSES else f"'{classes}'"
        raise UserError(
            f"{error}; carry the model over first with `nextscale adapt {config.start} --classes {advice} --out DIR`"
        ) from None


def _check_static(config: RunConfig, transformer: TransformerConfig) -> None:
    """UserError for a start checkpoint with dynamic experts."""
    if transformer.dynamic.router_fingerprint:
        raise UserError(
            f"{config.start} has routers that were trained for its FFNs, which training would change: train the model "
            "that it was made of, then `nextscale sparsify` that one"
        )


def _shuffle_features(examples: Examples, config: RunConfig) -> Examples:
    """The examples of a cache with the features of other images."""
    if not isinstance(examples, CachedExamples):
        raise UserError("loss.shuffle needs a token cache with features: make it with `nextscale tokenize --encoder`")
    return examples.shuffle_features(config.train.seed)


def _load_guidance(config: RunConfig, examples: Examples, world: World) -> tuple[PatchEncoder | None, int]:
    """The encoder of semantic guidance, unless the cache holds its features, and their width; 0 without guidance."""
    name = config.loss.encoder
    if not name:
        return None, 0
    if isinstance(examples, CachedExamples):
        if name != "cache":
            raise UserError(
                f"{config.data} is a token cache: features must be in it (make it with `nextscale tokenize --encoder "
                f"{name}`) and are used with --loss.encoder cache"
            )
        if not examples.feature_width:
            raise UserError(
                f"{config.data} holds no features: make it anew with `nextscale tokenize --encoder ENCODER`"
            )
        return None, examples.feature_width
    if name == "cache":
        raise UserError(f"loss.encoder is 'cache', but {config.data} is no token cache; name an encoder")
    encoder = load_encoder(name).to(world.device)
    return encoder, encoder.width


def _build_transformer(config: RunConfig, model: ModelConfig, weights: dict[str, Tensor]) -> VAR:
    """The transformer to train: initialized, then with the weights of the start checkpoint, if any."""
    _, transformer = build_modules(model)
    assert transformer is not None, "a generator has a transformer"
    initialize_transformer(transformer, config.init, make_generator(config.train.seed, "transformer"))
    if config.start:  # a start checkpoint without an alignment head gets a new one
        fresh = {n: t for n, t in transformer.state_dict().items() if n.startswith("projector.")}
        transformer.load_state_dict(fresh | {n: t.float() for n, t in weights.items()})
    if transformer.projector is not None:
        transformer.projector.requires_grad_(bool(config.loss.encoder))
    return transformer


def _build_config(config: RunConfig, checkpoint: Checkpoint, names: tuple[str, ...], width: int) -> ModelConfig:
    """The generator's config: the start checkpoint's, or the run's with the data's classes; with an alignment head for
    features of this width, if there are any."""
    own = checkpoint.config.pyramid
    sizes = tuple(pyramid for pyramid in config.sizes.list_pyramids(own) if pyramid != own)
    if not config.start:
        transformer: TransformerConfig | None = config.fit(len(names), checkpoint.config.image_size, width)
        _check_sizes(config, config.transformer)
        return dataclasses.replace(checkpoint.config, transformer=transformer, class_names=names, sizes=sizes)
    transformer = checkpoint.config.transformer
    assert transformer is not None, "_match_classes has checked it"
    _check_sizes(config, transformer)
    start = dataclasses.replace(checkpoint.config, class_names=names, sizes=sizes)
    if width and transformer.alignment.width != width:
        if transformer.alignment.width:
            raise UserError(
                f"the alignment head of {config.start} was trained for features of width "
                f"{transformer.alignment.width}; those of {config.loss.encoder} have {width}"
            )
        head = dataclasses.replace(config.transformer.alignment, width=width)
        return dataclasses.replace(start, transformer=dataclasses.replace(transformer, alignment=head))
    return start


def _check_sizes(config: RunConfig, transformer: TransformerConfig) -> None:
    """UserError for what is made for one size: control pictures, and dynamic FFNs."""
    if not config.sizes.scales:
        return
    if any(part.kind == "picture" for part in transformer.condition.list_parts().values()):
        raise UserError("control pictures have one size: leave out --sizes.scales, or train without them")
    if transformer.dynamic.on:
        raise UserError("dynamic experts belong to the scales of one size: leave out --sizes.scales")
