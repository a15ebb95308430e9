"""Finds the weights of a network in what training programs save.

A file may hold a state dict alone or nested in tables ("model", "ema", "state_dict", "trainer"), beside optimizers,
settings and counters. Names may begin with those of wrappers (DataParallel's "module.", torch.compile's "_orig_mod.",
Lightning's "model."). The weights are those tensors among whose names one is that the caller knows, the anchor:
"quantize.embedding.weight" of a tokenizer, for example.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.common.errors import UserError
from nextscale.common.notes import print_note

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Parts of names that wrappers insert, wherever they stand."""
_OUTER = {"module", "model"}
"""Parts of names that may be dropped where all tensors of the network begin with them."""
_DEEPEST = 6


@dataclass(frozen=True)
class _Weights:
    """Tensors that may be those of the network."""

    place: str
    """Keys and prefix that lead to them, as trainer.vae_ema."""
    tensors: dict[str, Tensor]

    @property
    def averaged(self) -> bool:
        """Whether they are a moving average of the trained weights."""
        return _is_average(self.place)


def find_state_dict(source: object, data: Any, anchors: Sequence[str] = (), prefer: str = "") -> dict[str, Tensor]:
    """The network's tensors in `data`, what a file holds, under the names that the network gives them.

    `anchors`: names of tensors of the network, the first of which that is found decides; without any `data` must hold a
    single state dict. `prefer`: a part of the key or prefix to take where several networks have the anchor. Where
    trained weights and their moving average (EMA) are both there the average is taken, which samplers use, with a note;
    tensors that it lacks, such as buffers, are those of the trained weights. Raises UserError naming what was found
    when that does not decide.
    """
    tables = list(_list_tables(data, ""))
    if not tables:
        raise UserError(f"{source} holds no state dict (a table of named, dense tensors); {_describe(data)}")
    for anchor in anchors or ("",):
        found = [weights for place, table in tables for weights in _split_networks(source, place, table, anchor)]
        if found:
            return _choose(source, found, prefer, _list_places(data, ""))
    place, table = max(tables, key=lambda entry: len(entry[1]))
    names = {_strip_wrappers(name): name for name in table}
    close = difflib.get_close_matches(anchors[0], names, n=2, cutoff=0.6) or sorted(names)[:2]
    listed = ", ".join(f"'{names[name]}'" for name in close)
    where = f" under '{place}'" if place else ""
    raise UserError(
        f"{source} has no tensor named '{anchors[0]}' or PREFIX.{anchors[0]}; it has {len(table)} others{where}, "
        f"such as {listed}"
    )


def _list_tables(data: Any, place: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All tables with named tensors in nested ones, with the keys that lead to them."""
    if not isinstance(data, Mapping) or depth > _DEEPEST:
        return
    table = {name: value for name, value in data.items() if isinstance(name, str) and _is_dense(value)}
    if table:
        yield place, table
    for name, value in data.items():
        if isinstance(name, str) and not re.match(r"optim|.*_opt$|.*optimizer|(lr_)?sched", name):
            yield from _list_tables(value, f"{place}.{name}" if place else name, depth + 1)


def _list_places(data: Any, place: str, depth: int = 0) -> Iterator[str]:
    """The keys of all nested tables, and the first parts of the names of tensors."""
    if isinstance(data, Mapping) and depth <= _DEEPEST:
        for name, value in data.items():
            if isinstance(name, str) and (isinstance(value, Mapping | list) or "." in name):
                first = name if isinstance(value, Mapping | list) else name.split(".")[0]
                inner = f"{place}.{first}" if place else first
                yield inner
                yield from _list_places(value, inner, depth + 1)


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _split_networks(source: object, place: str, table: dict[str, Tensor], anchor: str) -> Iterator[_Weights]:
    """The networks in a table that have the anchor, one for each prefix before it."""
    names = {name: _strip_wrappers(name) for name in table}
    if not anchor:
        names = _drop_common_parts(names)
        yield _Weights(place, _rename(source, table, names))
        return
    prefixes = {text.removesuffix(anchor) for text in names.values() if f".{text}".endswith(f".{anchor}")}
    mixed = {prefix for prefix in prefixes if set(prefix.split(".")[:-1]) <= _OUTER}
    for prefix in sorted(prefixes - mixed):
        chosen = {name: text.removeprefix(prefix) for name, text in names.items() if text.startswith(prefix)}
        yield _Weights(".".join(filter(None, (place, prefix.rstrip(".")))), _rename(source, table, chosen))
    if mixed:
        others = tuple(prefixes - mixed)
        rest = {name: text for name, text in names.items() if not (others and text.startswith(others))}
        outer = max(mixed, key=len)
        if outer:
            inside = {name: _drop_outer(text) for name, text in rest.items() if text.split(".")[0] in _OUTER}
            parts = {text.split(".")[0] for text in inside.values()}
            # Lightning keeps losses and metrics beside "model.", which are not of the network
            rest = {
                n: _drop_outer(t) for n, t in rest.items() if "" in mixed or n in inside or t.split(".")[0] in parts
            }
        yield _Weights(place, _rename(source, table, rest))


def _strip_wrappers(name: str) -> str:
    """A tensor's name without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def _drop_outer(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _OUTER:
        parts = parts[1:]
    return ".".join(parts)


def _drop_common_parts(names: dict[str, str]) -> dict[str, str]:
    """Names without outer parts, where all begin with one."""
    while all(text.split(".")[0] in _OUTER and "." in text for text in names.values()):
        names = {name: text.split(".", 1)[1] for name, text in names.items()}
    return names


def _rename(source: object, table: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors under new names; UserError when two get the same one."""
    out: dict[str, Tensor] = {}
    olds: dict[str, str] = {}
    for old, new in names.items():
        if new in out:
            raise UserError(f"{source} holds '{new}' twice: as '{olds[new]}' and as '{old}'; remove one of them")
        out[new], olds[new] = table[old].detach(), old
    return out


def _is_average(place: str) -> bool:
    """Whether a key or prefix is one of moving averages: ema, model_ema, ema_model, vae_ema, averaged."""
    return re.search(r"(^|[._])(ema|averaged?|swa)\d*($|[._])", place.lower()) is not None


def _choose(source: object, found: list[_Weights], prefer: str, places: Iterator[str]) -> dict[str, Tensor]:
    """The weights to use; UserError when several are there and nothing decides."""
    preferred = [weights for weights in found if prefer and prefer in weights.place.split(".")]
    found = preferred or found
    averages = [weights for weights in found if weights.averaged]
    trained = [weights for weights in found if not weights.averaged]
    if len(found) == 1:
        (only,) = found
        unused = [place for place in places if _is_average(place.split(".")[-1])]
        if unused and not only.averaged:
            where = f"those of '{only.place}'" if only.place else "the others"
            print_note(f"weights {source}", f"{source}: '{unused[0]}' holds no such named tensors; {where} are used")
        return only.tensors
    if len(averages) == 1 and len(trained) == 1:
        (average,), (model,) = averages, trained
        lacking = {name: tensor for name, tensor in model.tensors.items() if name not in average.tensors}
        also = f", with {len(lacking)} tensors that it lacks from the trained weights" if lacking else ""
        print_note(
            f"weights {source}",
            f"{source} holds trained weights ({model.place or 'at its top'}) and their moving average "
            f"({average.place}); the average is used{also}",
        )
        return average.tensors | lacking
    names = ", ".join(f"'{weights.place}'" if weights.place else "its top" for weights in found[:5])
    raise UserError(
        f"{source} holds {len(found)} networks that fit: {names}; save the wanted one to a file of its own "
        f"(torch.save(torch.load(FILE)[KEY], NEW))"
    )


def _describe(data: Any) -> str:
    """What a file holds, for a message."""
    if not isinstance(data, Mapping):
        return f"it holds a {type(data).__name__}"
    return f"its keys are {', '.join(repr(name)[:40] for name in list(data)[:8])}" if data else "it is empty"
