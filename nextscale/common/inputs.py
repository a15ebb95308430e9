"""What work was made of, recorded beside it and compared before it is used again.

A record is a JSON table: inputs.json of a run or a token cache, features.json of extracted features. It has an entry
for each input: a setting, or a table with the key "where" for what was read from files:

    files, bytes, names, modified    of `fingerprint_files`
    content                          of `fingerprint_path`, a digest of what the file holds
    weights                          of `compute_fingerprint`
    class_names, labels, captions    of `nextscale.data.inputs.describe_data`

"where" serves messages alone: the same files under another path are the same input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nextscale.common.digest import add_digest
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.reading import parse_json, read_json

INPUTS = "inputs.json"
_FILES = ("files", "bytes", "names")
_ABSENT = object()
RANDOM_NUMBERS = "random numbers"
RANDOM_NUMBER_GENERATOR = "Philox4x32-10 of seed, image and position"
"""What `nextscale.sampling.draw.PerImageRandom` computes, for the records of samples. Change it with the numbers."""
"""The name under which a record of samples says how their random numbers were computed."""
_BEFORE_RECORDED = {RANDOM_NUMBERS: "a Mersenne Twister for each image and scale"}
"""What an input was when records did not have it yet."""


class Differences(NamedTuple):
    """What differs between a record and the present inputs, in words."""

    changed: tuple[str, ...]
    unknown: tuple[str, ...]
    """Inputs that the record does not have: an earlier version wrote it."""


def list_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...] = (), prefix: str = ""
) -> list[str]:
    """What differs between two settings, as "train.learning_rate was 0.001, now 0.5"; names in `free` may differ."""
    changes = []
    for key in sorted({*before, *now} - set(free)):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            changes += list_changes(old, new, free, f"{name}.")
        elif old != new:
            changes.append(f"{name} was {old}, now {new}")
    return changes


def compare_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """Compare a record with the present inputs."""
    before = {key: value for key, value in before.items() if key != "digest"}
    found = list(_compare_tables(before, _to_json(now), ""))
    return Differences(tuple(text for text, known in found if known), tuple(text for text, known in found if not known))


def _compare_tables(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, bool]]:
    """(what differs, whether the record has it)."""
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key, _BEFORE_RECORDED.get(key, _ABSENT)), now.get(key, _ABSENT)
        name = f"{prefix}{key}"
        if old == new:
            continue
        if old is _ABSENT or (isinstance(old, str) and isinstance(new, dict) and "where" in new):
            yield name, False  # an earlier version had nothing, or the path alone
        elif isinstance(old, dict) and isinstance(new, dict):
            if "where" in old and "where" in new:
                yield from _compare_files(old, new, name)
            else:
                yield from _compare_tables(old, new, f"{name}.")
        else:
            yield f"{name} was {_describe(old)}, now {_describe(new)}", True


def _compare_files(before: dict[str, Any], now: dict[str, Any], name: str) -> Iterator[tuple[str, bool]]:
    """Like `_compare_tables`, of an input that was read from files."""
    where, keys = now["where"], [key for key in dict.fromkeys([*now, *before]) if key != "where"]
    changed = [key for key in keys if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    unknown = [key for key in changed if key not in before]
    if changed and unknown == changed:
        yield f"{name} ({', '.join(unknown)})", False
    elif changed and before["where"] != where:
        yield f"{name} was {before['where']}, now {where}", True
    elif {*_FILES} & {*changed}:
        yield f"the files of {where} have changed: {_count_files(before, now)}", True
    elif changed == ["modified"]:
        yield f"the files of {where} have other modification times, with equal names and sizes", True
    if not changed or before["where"] != where:
        return
    for key in changed:
        if key == "class_names":
            yield f"the classes of {where} were {_describe(before.get(key))}, now {_describe(now.get(key))}", True
        elif key in ("content", "weights", "labels", "captions"):
            yield f"the {key} of {where} {'has' if key == 'content' else 'have'} changed", True
        elif key not in (*_FILES, "modified", *unknown):
            yield f"{name}.{key} was {_describe(before[key])}, now {_describe(now.get(key))}", True


def _count_files(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How many files and bytes there were and are; of files that have identifiers of their own, which ones differ."""
    if isinstance(before.get("files"), dict) and isinstance(now.get("files"), dict):
        old, new = before["files"], now["files"]
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    counts = [f"{_describe(t.get('files'))} files, {_describe(t.get('bytes'))} bytes" for t in (before, now)]
    return (
        f"{counts[0]} as before, other names or sizes" if counts[0] == counts[1] else " before, ".join(counts) + " now"
    )


def _to_json(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as they are read back from a file."""
    table: dict[str, Any] = parse_json(json.dumps(dict(inputs)), "inputs")
    return table


def _describe(value: Any) -> str:
    """A value as text of one line and limited length."""
    if value is None or value is _ABSENT:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_inputs(
    record: Path, inputs: Mapping[str, Any], begun: Path, advice: str, *, accept: bool = False, show: bool = True
) -> None:
    """Raise UserError naming what changed since the work in the record's folder began, unless `accept`.

    `begun`: a file that the work has from its beginning. `advice`: what the user can do, the message's end. `show`:
    print a note where the record lacks inputs, because an earlier version wrote it.
    """
    if not begun.exists():
        return
    before = read_json(record) if record.exists() else {}
    if not isinstance(before, dict):
        raise UserError(f"{record} is not a record of inputs; {advice}")
    changed, unknown = compare_inputs(before, inputs)
    if changed and not accept:
        raise UserError(f"{record.parent} was made of other inputs: {'; '.join(changed)}; {advice}")
    if show and changed:
        print(f"note: accepted for {record.parent}: {'; '.join(changed)}")
    if show and unknown:
        print(
            f"note: {record.parent} does not record all that it was made of, as an earlier version began it; taken as "
            f"unchanged: {', '.join(unknown)}"
        )


def discard_stale(record: Path, inputs: Mapping[str, Any], pattern: str, what: str) -> None:
    """Write the record of work that is only stored to save time; if it was made of other inputs, delete it first.

    `pattern`: the files of the work in the record's folder. `what`: its name in the note that says what changed.
    """
    work = sorted(record.parent.glob(pattern))
    if record.exists():
        try:
            before = read_json(record)
            changed, unknown = compare_inputs(before if isinstance(before, dict) else {}, inputs)
        except UserError as error:
            changed, unknown = (str(error),), ()
        if not changed and not unknown:
            return
        if unknown and not changed:
            changed = (f"an earlier version made them, and did not record {', '.join(unknown)}",)
        if work:
            print(f"note: {what} in {record.parent} are made again: {'; '.join(changed)}")
    for file in work:
        file.unlink(missing_ok=True)
    write_json(record, add_digest(_to_json(inputs)))
