"""The option --profile: settings that `nextscale tune` left in a model's folder, as defaults of a command's options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

if TYPE_CHECKING:
    from nextscale.config.profile import Profile

ProfileName = Annotated[
    str,
    arg(
        help="Settings and type that `nextscale tune` found for the model, by name, such as fast; options and --config "
        "override them."
    ),
]


def load_profile(command: Any) -> Profile | None:
    """The profile that a command names, of its model's folder; None where it names none.

    UserError when the folder has no such profile or it does not fit.
    """
    name = getattr(command, "profile", "")
    if not name:
        return None
    from nextscale.config.profile import read_profile, refuse_adapters

    if getattr(command, "lora", ()):
        raise refuse_adapters(name)
    model = str(command.source if hasattr(command, "source") else command.model)
    folder = Path(model)
    if not folder.exists():
        from nextscale.checkpoints.native import find_folder

        folder = find_folder(model)
    return read_profile(folder, name)


def note_machine(profile: Profile, command: Any) -> None:
    """Print a note where a profile was found on another machine than this one."""
    from nextscale.common.devices import find_device
    from nextscale.common.machine import describe_machine

    here, there = describe_machine(find_device(command.device))["device"], profile.measured.machine.get("device")
    if here != there and os.environ.get("RANK", "0") == "0":
        other = f"profile {command.profile} was found on another machine ({there})"
        print(f"note: {other}; here other settings may be faster", flush=True)
