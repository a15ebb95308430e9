"""Exceptions whose message is for the user."""

import re

_LONGEST = 2000


class UserError(ValueError):
    """An error that the caller can correct: in a config, a file, a label, on a full disk.

    The message says what is wrong, where, and what to do. The command line prints it in one line and exits with
    `exit_status`. Any other exception is a defect of nextscale. Messages quote files and other libraries, so escape
    codes, control characters and line breaks are taken out.
    """

    exit_status = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(clean_message(str(message)))


class SettingError(UserError):
    """A setting whose value breaks a rule. The command line names the setting as its option was typed."""

    def __init__(self, part: str, rule: str, name: str, value: object, names: tuple[str, ...] = ()):
        """`rule`: a sentence without its end that starts with the name. `names`: other settings it may speak of."""
        super().__init__(f"{part}: {rule}; got {name}={value}" if part else f"{rule}; got {name}={value}")
        self.rule, self.name, self.value, self.names = rule, name, value, names


class Interruption(UserError):
    """The user stopped the command. The message says what is saved and how to resume."""

    exit_status = 130


class ChecksFailedError(UserError):
    """Some checks of `nextscale doctor` failed; the message names them."""

    exit_status = 1


def clean_message(text: str) -> str:
    """The text as one line of at most 2,000 characters, without terminal escape codes and control characters."""
    text = text.encode("utf-8", "backslashreplace").decode()  # names of files may hold bytes that are no text
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "?", text)
    text = re.sub(r"[ \t]*[\n\r\v\f\u2028\u2029]\s*", " ", text).strip()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
