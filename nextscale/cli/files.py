"""What the commands read and write: each declares it, and `check_files` refuses what would destroy something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

if TYPE_CHECKING:
    from nextscale.common.outputs import Input


Overwrite = Annotated[
    bool,
    arg(help="Replace what is in the place of an output, if it is of the same kind but not from the same command."),
]
"""The option of commands that write at once. Commands that resume have none."""
Show = Annotated[
    bool, arg(help="Show the result in the terminal: as a picture where it can (kitty, iTerm2, Sixel), else in blocks.")
]
Adapters = Annotated[
    tuple[str, ...],
    arg(
        help="Adapters (LoRA) to add to the weights: folders that `nextscale train --lora.rank` wrote, each with a "
        "weight after a colon if it is not 1: runs/cat:0.8 runs/ink."
    ),
]
"""The option --lora."""
Scales = Annotated[
    str,
    arg(
        help="Sides of the token maps, such as 1,2,3x4: other ones than the model's own, coarse to fine "
        "(docs/sizes.md)."
    ),
]
"""The option --scales of commands that use a model."""
ImageSize = Annotated[
    str,
    arg(
        help="Use another image size than the model's own, in pixels, at scales in proportion: 48, or HEIGHTxWIDTH, as "
        "32x48; 0 = the model's."
    ),
]
"""The option --size of commands that use a model."""
Paths = Mapping[str, "str | Path | Sequence[str | Path] | None"]
"""Option (--data, MODEL): a path, several, or none."""


def list_inputs(
    *,
    images: Paths | None = None,
    models: Paths | None = None,
    networks: Paths | None = None,
    files: Paths | None = None,
) -> list[Input]:
    """The inputs of a command: data sets, checkpoint folders, feature networks and encoders, and single files."""
    from nextscale.common.outputs import Input

    inputs = []
    for holds, group in (("images", images), ("model", models), ("network", networks), ("file", files)):
        for option, value in (group or {}).items():
            several = [value] if isinstance(value, str | Path) else list(value or ())
            inputs += [Input(option, Path(v), holds) for v in several if str(v)]  # type: ignore[arg-type]
    return inputs


def list_folders(adapters: Sequence[str]) -> list[str]:
    """The folders of --lora."""
    from nextscale.config.lora import parse_source

    return [parse_source(source)[0] for source in adapters]


def check_files(command: Any) -> AbstractContextManager[None]:
    """Check the inputs and outputs that a command declares; the context to run it in.

    A command declares them in `list_files() -> (outputs, inputs)`, and in `list_needs() -> {package: purpose}` the
    optional packages that it needs besides those of its inputs. Raises UserError as `check_outputs` does, and when a
    package cannot be imported. The context removes empty folders when the command fails.
    """
    from nextscale.common.extras import check_extras

    if hasattr(command, "list_needs"):
        check_extras(command.list_needs())
    if not hasattr(command, "list_files"):
        return nullcontext()
    from nextscale.common.outputs import check_outputs, remove_empty_folders

    outputs, inputs = command.list_files()
    for given in inputs:
        check_extras(given.list_needs())
    check_outputs(outputs, inputs, overwrite=getattr(command, "overwrite", False))
    return remove_empty_folders(outputs)


def list_terminal_needs(show: bool) -> dict[str, str]:
    """The optional package of --show, where that is asked for."""
    return {"textual_image": "--show"} if show else {}
