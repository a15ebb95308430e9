"""The command line: `nextscale COMMAND`."""

from nextscale.cli.parser import main

__all__ = ["main"]
