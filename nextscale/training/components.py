"""The components of a run of `nextscale train`: data, tokenizer, transformer and guidance, which must fit together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nextscale.checkpoints import Checkpoint, build_modules
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.parts import load_tokenizer
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.rng import make_generator
from nextscale.config.model import ModelConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import CachedExamples, open_examples
from nextscale.data.examples import Examples
from nextscale.encoders.load import load_encoder
from nextscale.encoders.patches import PatchEncoder
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.transformer.initialization import initialize_transformer
from nextscale.transformer.var import VAR


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


def load_components(config: RunConfig, world: World) -> Components:
    """Load or create the components of a run. Raises UserError when they do not fit together."""
    checkpoint = read_checkpoint(Path(config.start or config.tokenizer))
    if config.scales and config.tokenizer:
        checkpoint.config = dataclasses.replace(checkpoint.config, pyramid=Pyramid.parse(config.scales))
    tokenizer = load_tokenizer(checkpoint, checkpoint.config)
    weights = checkpoint.tokenizer | {"quantizer.usage_KV": tokenizer.quantizer.usage_KV}
    examples, held_out, names = open_examples(
        config.data, checkpoint.config, tokenizer, config.images, config.train.seed
    )
    encoder, width = _load_guidance(config, examples, world)
    model = _build_config(config, checkpoint, names, width)
    transformer = _build_transformer(config, model, checkpoint.transformer)
    if world.main:
        print(f"{config.data}: {len(examples)} examples to train on, {len(held_out)} held out; {model.summarize()}")
    return Components(model, tokenizer, weights, transformer, examples, held_out, encoder)


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
    if not config.start:
        transformer: TransformerConfig | None = config.with_classes(len(names), width)
        return dataclasses.replace(checkpoint.config, transformer=transformer, class_names=names)
    transformer = checkpoint.config.transformer
    if transformer is None:
        raise UserError(f"{config.start} is a tokenizer alone: give it as --tokenizer to train a new transformer")
    if transformer.dynamic.router_fingerprint:
        raise UserError(
            f"{config.start} has routers that were trained for its FFNs, which training would change: train the model "
            "that it was made of, then `nextscale sparsify` that one"
        )
    if transformer.condition.num_classes != len(names):
        raise UserError(
            f"{config.start} knows {transformer.condition.num_classes} classes, {config.data} has {len(names)}: "
            f"carry the model over first with `nextscale adapt {config.start} --classes {len(names)} --out DIR`"
        )
    if width and transformer.alignment.width != width:
        if transformer.alignment.width:
            raise UserError(
                f"the alignment head of {config.start} was trained for features of width "
                f"{transformer.alignment.width}; those of {config.loss.encoder} have {width}"
            )
        head = dataclasses.replace(config.transformer.alignment, width=width)
        return dataclasses.replace(checkpoint.config, transformer=dataclasses.replace(transformer, alignment=head))
    return checkpoint.config
