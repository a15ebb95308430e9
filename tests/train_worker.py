"""A training process for tests: python -m tests.train_worker FOLDER TASK [setting=value ...], alone or under torchrun.

Trains the tiny task 0 (tokenizer), 1 (transformer; with router=NAME a mixture of experts) or 2 (encoder) of
tests/test_train.py and writes FOLDER/final.pt.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from nextscale.errors import UserError
from nextscale.train.loop import Interrupted, fit
from nextscale.train.parallel import whole_weights
from nextscale.train.tokenizer_config import CodebookConfig
from nextscale.train.tokenizer_task import TokenizerTask
from nextscale.train.world import join_world
from tests.conftest import randomised, tiny_config
from tests.test_train import SETTINGS, mixture_task, tasks


def main(folder: Path, which: int, changes: dict) -> int:
    torch.set_num_threads(1)
    router = changes.pop("router", "")
    task = mixture_task(router) if router else tasks(randomised(tiny_config()))[which]
    if changes.pop("codebook", None) == "ema":
        task = TokenizerTask(task.tokenizer, task.examples, codebook=CodebookConfig(update="ema", revive_every=3))
    accept = bool(changes.pop("accept", 0))
    with join_world("cpu") as world:
        try:
            fit(task, replace(SETTINGS, **changes), folder, world=world, accept_changes=accept)
        except Interrupted as stop:
            print("stopped", stop.step)
            return 5
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        weights = whole_weights(task.trained)
        if world.main:
            torch.save(weights, folder / "final.pt")
    return 0


def parse(text: str):
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, value


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), dict(map(parse, sys.argv[3:]))))
