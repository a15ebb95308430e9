"""Exceptions whose message is for the user."""


class UserError(ValueError):
    """An error that the caller can correct: in a config, a file, a label, on a full disk.

    The message says what is wrong, where, and what to do. The command line prints it in one line and exits with
    `exit_status`. Any other exception is a defect of nextscale.
    """

    exit_status = 2


class Interruption(UserError):
    """The user stopped the command. The message says what is saved and how to resume."""

    exit_status = 130
