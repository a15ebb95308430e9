"""Progress bars and messages on one screen. Needs no torch."""

from __future__ import annotations

import sys


def close_progress_bars() -> None:
    """End every progress bar of tqdm that is still shown, so that what is printed next begins on a line of its own.

    An error leaves the bar of the loop that it ended on the screen, without a line break.
    """
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:  # nothing has shown a bar
        return
    for bar in list(getattr(tqdm.tqdm, "_instances", ())):
        bar.close()
