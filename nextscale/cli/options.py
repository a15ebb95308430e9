"""The options of one command: from the words of the command line, a config file and a profile. Imports tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import tyro

from nextscale.cli.help import HELP, hide_options, list_required
from nextscale.cli.spelling import restore_spelling
from nextscale.common.errors import UserError
from nextscale.config.files import read_settings
from nextscale.config.idle import check_steps
from nextscale.config.parse import reset_derived

if TYPE_CHECKING:
    from nextscale.config.profile import Profile


def parse_options(name: str, kind: type, arguments: list[str], profile: Profile | None = None) -> Any:
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
