"""The command line: parse the arguments, run a command, print errors in one line.

`nextscale --help` needs no torch; the list of commands needs no command's module either, nor tyro.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from nextscale import __version__
from nextscale.cli.commands import COMMANDS
from nextscale.cli.spelling import name_as_typed, refuse_empty_paths, refuse_repeated_lists, spell_out_types
from nextscale.common.errors import SettingError, UserError
from nextscale.common.progress import close_progress_bars

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
            from nextscale.cli.files import check_files
            from nextscale.config.idle import print_setting_notes

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
        print(_INTRO + "\n".join(f"  {name:<20}{text}" for name, text in COMMANDS.read_summaries().items()))
        return None
    if arguments[0] in ("-V", "--version"):
        print(f"nextscale {__version__}")
        return None
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        from nextscale.config.parse import suggest_name

        name = " ".join(arguments[:2]) if any(c.startswith(f"{name} ") for c in COMMANDS) else name
        raise UserError(f"there is no command '{name}'{suggest_name(name, list(COMMANDS))}")
    from nextscale.cli.options import parse_options
    from nextscale.cli.profiles import load_profile, note_machine

    kind, rest = COMMANDS[name], _move_lists_last(spell_out_types(rest))
    refuse_empty_paths(kind, rest)
    refuse_repeated_lists(kind, rest)
    try:
        command = parse_options(name, kind, rest)
        profile = load_profile(command)
        if profile is not None:
            note_machine(profile, command)
            command = parse_options(name, kind, rest, profile)
        if hasattr(command, "check"):
            command.check()
        return command
    except SettingError as error:
        raise UserError(name_as_typed(error, rest)) from error


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


if __name__ == "__main__":
    sys.exit(main())
