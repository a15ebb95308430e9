"""Registries: the parts of a transformer that a config names, built in or your own. Needs no torch.

Your own part registers its class under a name; configs, checkpoints and the command line then use the name:

    from nextscale.common.registry import ROUTERS

    @ROUTERS.register("my-router")
    class MyRouter(nn.Module): ...

A config or a checkpoint never imports code. The module that registers a name has to be imported first: `import
my_module` in Python, `nextscale --import my_module ...` on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from nextscale.common.errors import UserError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes of one kind by name.

    `kind`: what messages call the parts, in the singular. `built_in`: names and where their classes are, as
    "module:attribute"; a built-in class is imported when it is first looked up. `reserved`: names that a config may use
    but that stand for no class, such as "none".
    """

    def __init__(self, kind: str, built_in: Mapping[str, str], reserved: tuple[str, ...] = ()):
        self.kind, self.reserved = kind, reserved
        self._entries: dict[str, type[T] | str] = dict(built_in)

    @property
    def names(self) -> tuple[str, ...]:
        """All registered names, built-in ones first."""
        return tuple(self._entries)

    @property
    def own_modules(self) -> set[str]:
        """Modules outside the package that registered classes."""
        modules = {_path(entry).partition(":")[0] for entry in self._entries.values()}
        return {module for module in modules if module.partition(".")[0] != "nextscale"}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def register(self, name: str) -> Callable[[C], C]:
        """A class decorator that registers the class under `name`.

        Registering the same class again does nothing; raises UserError when the name belongs to another class.
        """
        if not name or name in self.reserved or any(c.isspace() or c == "," for c in name):
            raise UserError(f"a {self.kind} cannot be named '{name}': names are words without commas")

        def add(cls: C) -> C:
            old = self._entries.get(name)
            if old is not None and _path(old) != _path(cls):
                raise UserError(f"the {self.kind} '{name}' is already registered, as {_path(old)}; choose another name")
            self._entries[name] = cls
            return cls

        return add

    def check(self, name: str, where: str = "") -> None:
        """Raise UserError when a config cannot use `name`; imports nothing. `where`: the setting that holds it."""
        if name not in self.reserved and name not in self._entries:
            raise UserError(f"{where}{': ' if where else ''}{self._explain(name)}")

    def get(self, name: str) -> type[T]:
        """The class registered under `name`; UserError when there is none."""
        if name not in self._entries:
            raise UserError(self._explain(name))
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry

    def _explain(self, name: str) -> str:
        known = ", ".join(f"'{n}'" for n in (*self.reserved, *self._entries))
        return (
            f"unknown {self.kind} '{name}'; it must be one of {known}. If it is your own, import the module that "
            "registers it first: `import my_module` in Python, `nextscale --import my_module ...` on the command line"
        )


def _path(entry: type | str) -> str:
    """Where a class is, as "module:attribute"."""
    return entry if isinstance(entry, str) else f"{entry.__module__}:{entry.__qualname__}"


_TRANSFORMER = "nextscale.transformer"
_FEED_FORWARD = f"{_TRANSFORMER}.feed_forward"

MIXERS: Registry[Any] = Registry(
    "mixer",
    {
        "attention": f"{_TRANSFORMER}.attention:Attention",
        "scale-attention": f"{_TRANSFORMER}.scale_attention:ScaleAttention",
        "mamba": f"{_TRANSFORMER}.mamba:Mamba2",
        "cross-attention": f"{_TRANSFORMER}.cross_attention:CrossAttention",
    },
)
"""What mixes the tokens of a block: `TransformerConfig.mixers`."""

ROUTERS: Registry[Any] = Registry(
    "router",
    {
        "stmoe": f"{_FEED_FORWARD}.routers:ScaleTokenRouter",
        "smoe": f"{_FEED_FORWARD}.routers:ScaleRouter",
        "expert-choice": f"{_FEED_FORWARD}.routers:ExpertChoiceRouter",
        "moe++": f"{_FEED_FORWARD}.routers:ZeroComputationRouter",
    },
    reserved=("none",),
)
"""What assigns tokens to the experts of a mixture: `ExpertsConfig.router`."""

FEED_FORWARDS: Registry[Any] = Registry(
    "feed-forward",
    {
        "dense": f"{_FEED_FORWARD}:DenseFeedForward",
        "mixture": f"{_FEED_FORWARD}.mixture:MixtureOfExperts",
        "dynamic": f"{_FEED_FORWARD}.dynamic:DynamicFeedForward",
    },
    reserved=("auto",),
)
"""The feed-forward layer of a block: `TransformerConfig.feed_forward`."""

CONDITIONS: Registry[Any] = Registry(
    "condition",
    {
        "class": f"{_TRANSFORMER}.condition:ClassCondition",
        "text": f"{_TRANSFORMER}.conditions.text:TextCondition",
        "vector": f"{_TRANSFORMER}.conditions.vector:VectorCondition",
        "picture": f"{_TRANSFORMER}.conditions.picture:PictureCondition",
        "combined": f"{_TRANSFORMER}.conditions.combined:CombinedCondition",
    },
)
"""What an image is conditioned on: `ConditionConfig.kind`."""


def list_own_modules() -> list[str]:
    """Modules outside the package that registered parts. A new process imports them to have the same parts."""
    registries: tuple[Registry[Any], ...] = (MIXERS, ROUTERS, FEED_FORWARDS, CONDITIONS)
    return sorted(set().union(*(registry.own_modules for registry in registries)))
