"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Something the caller can mend: a config, a file, a label, a full disk.

    The message says what was wrong, where, and what to do. The command line prints it on one line and exits
    with a non-zero status; everything else that escapes is a defect of nextscale and shows its traceback.
    """

    exit_status = 2


class Interruption(UserError):
    """The user stopped the work; the message says what is kept and how to go on."""

    exit_status = 130
