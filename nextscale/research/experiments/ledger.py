"""What the inputs of experiments were when they were first used in a folder.

Trainings and measurements are stored under a key of the inputs' paths. inputs.json in the folder of a scale keeps the
fingerprint of what was at each path, so that nothing is reused after it changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.fingerprint import fingerprint_path
from nextscale.common.inputs import INPUTS, compare_inputs
from nextscale.common.reading import read_json
from nextscale.config.data import ReadConfig
from nextscale.data.cache import is_token_cache
from nextscale.data.inputs import describe_cache, describe_data
from nextscale.data.sources import open_source


def check_experiment_inputs(
    folder: Path, data: Sequence[str], others: Sequence[str], world: World, reading: ReadConfig | None = None
) -> None:
    """Compare inputs with what they were, and record those that are new; all processes must call it.

    `data`: data sets, token caches or statistics; `reading`: how data sets are read; `others`: models and networks.
    Names that are no paths are left to the commands that open them. Raises UserError naming what changed.
    """
    record = folder / INPUTS
    before = read_json(record) if record.exists() else {}
    if not isinstance(before, dict):
        raise UserError(f"{record} is not a record of inputs: delete it if the inputs are unchanged")
    now = {path: _describe_data(path, reading) for path in data if path} | {p: fingerprint_path(p) for p in others if p}
    now = {path: described for path, described in now.items() if len(described) > 1}
    changed, _ = compare_inputs({path: before[path] for path in now if path in before}, now)
    if changed:
        raise UserError(
            f"{folder} holds trainings and figures of other inputs: {'; '.join(changed)}; choose another --out"
        )
    if world.main and not record.exists() and any(folder.glob("*/finished.json")):
        print(f"note: {folder} does not record its inputs, as an earlier version began it; taken as unchanged")
    world.wait()
    if world.main:
        write_json(record, before | now)


def _describe_data(path: str, reading: ReadConfig | None) -> dict[str, Any]:
    """What tells whether a data set, a token cache or a file of statistics changed."""
    if is_token_cache(Path(path)):
        return describe_cache(Path(path))
    if path == "digits" or (Path(path).exists() and not path.endswith(".npz")):
        with suppress(UserError):  # such as a table whose columns a recipe names; the command that opens it says more
            return describe_data(open_source(path, 8, reading))
    return fingerprint_path(path)
