"""The command line: parse the arguments, run a command, print errors in one line. `nextscale --help` needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import tyro

from nextscale import __version__
from nextscale.cli.commands import COMMANDS
from nextscale.cli.files import check_files
from nextscale.cli.help import HELP, hide_options, list_required
from nextscale.cli.profiles import load_profile, note_machine
from nextscale.cli.spelling import name_as_typed, refuse_empty_paths, restore_spelling, spell_out_types
from nextscale.common.errors import SettingError, UserError
from nextscale.common.progress import close_progress_bars
from nextscale.config.files import read_settings
from nextscale.config.idle import check_steps, print_setting_notes
from nextscale.config.parse import reset_derived, suggest_name

if TYPE_CHECKING:
    from nextscale.config.profile import Profile

_INTRO = f"""nextscale {__version__}: next-scale image generation.

usage: nextscale [--import MODULE] COMMAND [OPTIONS]        nextscale COMMAND --help explains one command

--import MODULE imports your own Python module first, which registers your routers, mixers, feed-forwards or conditions.

commands:
"""


_LIST_OPTIONS = {"cfg", "temperature", "top-k", "top-p", "tau", "prune"}
"""Options that take one number or several, as words or separated by commas."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit status: 0; 2 for a user's error; 1 for a defect of nextscale; 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parse(arguments)
        if command is not None:
            if os.environ.get("RANK", "0") == "0":
                print_setting_notes(command)
            with check_files(command):
                from nextscale.backends.cpu.memory import keep_freed_memory

                keep_freed_memory()  # the process is ours
                try:
                    command.run()
                finally:
                    close_progress_bars()  # before an error is printed
        return 0
    except UserError as error:
        told = getattr(error, "told", False)  # by another process of the run
        return error.exit_status if told else _print_error(str(error), error.exit_status)
    except KeyboardInterrupt:
        print("nextscale: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output was closed, as in `nextscale info ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        return _print_error(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 2)
    except Exception as error:
        if os.environ.get("NEXTSCALE_TRACEBACK"):
            raise
        from nextscale.common.machine import is_out_of_memory

        if is_out_of_memory(error):
            return _print_error("there is not enough memory for this; choose smaller sizes or batches", 2)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _print_error(f"{what[:500]} (unexpected; NEXTSCALE_TRACEBACK=1 shows where)", 1)


def _print_error(text: str, status: int) -> int:
    print(f"nextscale: error: {text}", file=sys.stderr)
    return status


def parse(arguments: list[str]) -> Any:
    """The command with its options, or None when only help or the version was asked for."""
    arguments = _import_modules(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_INTRO + "\n".join(f"  {n:<20}{_get_summary(c)}" for n, c in COMMANDS.items()))
        return None
    if arguments[0] in ("-V", "--version"):
        print(f"nextscale {__version__}")
        return None
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        name = " ".join(arguments[:2]) if any(c.startswith(f"{name} ") for c in COMMANDS) else name
        raise UserError(f"there is no command '{name}'{suggest_name(name, list(COMMANDS))}")
    kind, rest = COMMANDS[name], _move_lists_last(spell_out_types(rest))
    refuse_empty_paths(kind, rest)
    try:
        command = _parse_options(name, kind, rest)
        profile = load_profile(command)
        if profile is not None:
            note_machine(profile, command)
            command = _parse_options(name, kind, rest, profile)
        if hasattr(command, "check"):
            command.check()
        return command
    except SettingError as error:
        raise UserError(name_as_typed(error, rest)) from error


def _parse_options(name: str, kind: type, arguments: list[str], profile: Profile | None = None) -> Any:
    """The command from its arguments, with defaults of a profile. What tyro frames in a box is printed as it is, or
    raised where it is ours."""
    defaults = read_defaults(kind, [word for word in arguments if word not in HELP], profile)
    description = inspect.cleandoc(kind.__doc__ or "")
    given, shown, before = arguments, kind, defaults
    if not HELP.isdisjoint(arguments):
        if "--help-all" not in arguments:
            shown, defaults, hint = hide_options(kind, defaults)
            description += hint.format(name=name)
        given = ["--help"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            command = tyro.cli(
                shown,
                prog=f"nextscale {name}",
                description=description,
                args=given,
                default=defaults,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(restore_spelling(printed.getvalue(), arguments))
        raise
    if hasattr(command, "settings"):
        check_steps(command.settings, get_default_settings(kind) if before is None else before.settings)
    return command


def _import_modules(arguments: list[str]) -> list[str]:
    """Import the module of each `--import MODULE`, before or after the command; return the other arguments."""
    others: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, equals, name = word.partition("=")
        if option != "--import":
            others.append(word)
            continue
        if not equals:
            name = rest.pop(0) if rest else ""
        if not name or name.startswith("-"):
            raise UserError("--import needs the name of a Python module: nextscale --import my_module COMMAND ...")
        _import_module(name)
    return others


def _import_module(name: str) -> None:
    """Import a user's module, also from the current folder; UserError with the reason when that fails."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the last place to look, so that files there hide no installed module
    try:
        importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:
        if os.environ.get("NEXTSCALE_TRACEBACK"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"cannot import '{name}': {reason} (NEXTSCALE_TRACEBACK=1 shows where)") from error


def _move_lists_last(arguments: list[str]) -> list[str]:
    """The arguments with options that take lists of numbers at the end, one number a word.

    So 0.82,0.81 means the same as 0.82 0.81, and a list does not swallow a positional word that follows it.
    """
    others: list[str] = []
    lists: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option.split(".")[-1].lstrip("-").replace("_", "-") not in _LIST_OPTIONS:
            others.append(word)
            continue
        values = [value] if equals else []
        while rest and not equals and (_is_number_list(rest[0]) or not (values or rest[0].startswith("-"))):
            values.append(rest.pop(0))
        lists += [option, *(number for value in values for number in value.split(",") if number)]
    return others + lists


def _is_number_list(word: str) -> bool:
    try:
        return bool([float(number) for number in word.split(",") if number])
    except ValueError:
        return False


def get_default_settings(kind: type) -> Any:
    """The default of a command's settings."""
    (factory,) = (f.default_factory for f in dataclasses.fields(kind) if f.name == "settings")
    assert callable(factory), "settings are tables"
    return factory()


def read_defaults(kind: type, arguments: list[str], profile: Profile | None = None) -> Any:
    """The command with the settings of its config file as defaults, over those of a profile; None when neither is
    given."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if "settings" not in fields:
        return None
    path = (
        _find_config_option(arguments)
        if "config" in fields and fields["config"].default is None
        else _find_config_word(arguments)
    )
    if path is None and profile is None:
        return None
    settings = None if profile is None else profile.settings
    if path is not None:
        settings = read_settings(get_type_hints(kind)["settings"], path, settings)
    types: dict[str, Any] = {}
    if profile is not None:
        types = {"dtypes": (profile.dtype,)} if "dtypes" in fields else {"dtype": profile.dtype}
    return kind(**dict.fromkeys(list_required(kind), tyro.MISSING), **types, settings=reset_derived(settings))


def _find_config_word(arguments: list[str]) -> Path | None:
    """The config file of commands whose first word it is, as in `tokenizer train CONFIG`."""
    return Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None


def _find_config_option(arguments: list[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config":
            following = arguments[i + 1 : i + 2]
            return Path(value) if equals else Path(following[0]) if following else None
    return None


def _get_summary(command: type) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
