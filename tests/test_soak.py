"""Killed at any moment, also while it saves, a run goes on and ends with the bytes of one that was left alone.

A few kills here; `make soak` does more (NEXTSCALE_SOAK=24).
"""

import os
import random
import signal
import time
from pathlib import Path

from nextscale.common.distributed import World
from tests import forked
from tests.train_worker import main, parse, train_case

KILLS = int(os.environ.get("NEXTSCALE_SOAK", 2))
# accumulation, data workers, the middle of an epoch (20 examples, batches of 6), a save after every step
STEPS = 30 if KILLS <= 2 else 150
SETTINGS = [f"steps={STEPS}", "save_every=1", "micro_batch=2", "workers=2", "ema=0.9", "keep=3"]


def states(folder: Path) -> int:
    return max((int(p.stem.split("-")[1]) for p in (folder / "training").glob("transformer-*.pt")), default=0)


def test_kills_at_random_moments(threads_set, tmp_path):
    threads_set(1)  # as the processes
    rng = random.Random(0)
    cut, kills, in_a_save = tmp_path / "cut", 0, 0
    while kills < KILLS:
        before, process = states(cut), forked.start(main, [str(cut), "1", *SETTINGS], files=tmp_path / "said")
        while states(cut) < before + 2 and process.alive:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        if not process.alive:
            status, _, errors = process.end()
            assert status == 0, errors
            break  # it was finished first
        process.kill(signal.SIGKILL)
        process.end()
        in_a_save += bool(list((cut / "training").glob(".*")))
        kills += 1
    print(f"{kills} kills, {in_a_save} of them while a state was written")
    for folder in (cut, tmp_path / "whole"):
        train_case(folder, 1, dict(map(parse, SETTINGS)), World())
    assert kills == KILLS or states(cut) == STEPS
    assert (cut / "final.pt").read_bytes() == (tmp_path / "whole" / "final.pt").read_bytes()
