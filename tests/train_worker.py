"""Training processes for tests: python -m tests.train_worker FOLDER TASK [setting=value ...] [-- FOLDER TASK ...] ...

Alone or under torchrun. `python -m tests.train_worker SESSIONS.json` reads [[processes, [word, ...]], ...] and
does each by so many new processes, which it forks: torch is imported once.

Trains the tiny task 0 (tokenizer), 1 (transformer; with router=NAME a mixture of experts, with shared=1 one whose
layers share a scale embedding, with over=batch balanced over the batch and guided without aggregation; with mixers=mvar
an M-VAR, with condition=combined one of captions and pictures, with sizes=1 at two sizes) or 2 (encoder) of
tests/test_train.py, with lora=RANK adapters of it and a new class, one case after the other, and writes
FOLDER/final.pt and, for each process, FOLDER/held-RANK.json: which share of each parameter it holds.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from nextscale.common.distributed import World, init_distributed
from nextscale.common.errors import UserError
from nextscale.config.lora import LoraConfig
from nextscale.config.tokenizer_training import CodebookConfig
from nextscale.config.transformer import MVAR_MIXERS, MambaConfig
from nextscale.config.transformer_training import LossConfig
from nextscale.training.engine.checks import Interrupted
from nextscale.training.engine.distributed import gather_weights
from nextscale.training.engine.loop import Callbacks, train
from nextscale.training.engine.task import Task
from nextscale.training.tokenizer import TokenizerTask
from nextscale.training.validation import validate
from nextscale.transformer.lora import add_adapters
from tests.conftest import randomised, tiny_config
from tests.test_train import SETTINGS, combined_task, mixture_task, sized_task, tasks

MVAR = {"mixers": MVAR_MIXERS, "mamba": MambaConfig(state_width=6, head_width=8)}


def run_sessions(path: Path) -> int:
    """Each of the sessions by new processes; the first exit status that is not 0."""
    from tests.process_worker import fork_all

    for size, words in json.loads(path.read_text()):
        drafts = [path.with_suffix(f".{rank}") for rank in range(size)]
        if any(statuses := fork_all(size, lambda words=words: main(words), drafts)):
            print(*(draft.read_text()[-3000:] for draft in drafts), file=sys.stderr)
            return next(filter(None, statuses))
    return 0


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    with init_distributed("cpu") as world:
        try:
            for _, case in groupby(arguments, lambda word: word == "--"):
                if (words := list(case)) != ["--"]:
                    train_case(Path(words[0]), int(words[1]), dict(map(parse, words[2:])), world)
        except Interrupted as stop:
            print("stopped", stop.step)
            return 5
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


def train_case(folder: Path, which: int, changes: dict, world: World) -> None:
    """One case. stop=STEP breaks off in the middle of that step; frozen=NAME trains all but what is named so;
    validate=1 validates on the training examples at every save."""
    task = build(which, changes)
    stop, frozen = changes.pop("stop", None), changes.pop("frozen", None)
    for name, parameter in task.trained.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad_(False)
    if stop is not None:
        break_off(task, stop)
    accept, callbacks = bool(changes.pop("accept", 0)), Validating(task, world) if changes.pop("validate", 0) else None
    try:
        train(task, replace(SETTINGS, **changes), folder, callbacks, world=world, accept_changes=accept)
    except KeyboardInterrupt:
        return
    held = dict(shares(task))
    (folder / f"held-{world.rank}.json").write_text(json.dumps(held))
    weights = gather_weights(task.trained)
    if world.main:
        torch.save(weights, folder / "final.pt")


class Validating(Callbacks):
    """Measures a transformer on its training examples."""

    def __init__(self, task: Task, world: World):
        self.task, self.world = task, world

    def validate(self, step):
        return validate(self.task, self.task.examples, 100, self.world)


def build(which: int, changes: dict) -> Task:
    """The task that `changes` ask for; what they say about it is taken out of them."""
    router = changes.pop("router", "")
    mixers = MVAR if changes.pop("mixers", "") == "mvar" else {}
    if changes.pop("condition", "") == "combined":
        return combined_task()
    if changes.pop("sizes", 0):
        return sized_task()
    loss = LossConfig(balance=1.0, balance_over="batch", encoder="cache", group="1,3", aggregate=False)
    loss = loss if changes.pop("over", "") == "batch" else None
    shared = bool(changes.pop("shared", 0))
    mixture = mixture_task(router, loss, share_scale_embedding=shared) if router else None
    task = mixture or tasks(randomised(tiny_config(**mixers)))[which]
    if rank := changes.pop("lora", 0):
        add_adapters(task.model, LoraConfig(rank=rank), torch.ones(1, 32), torch.Generator().manual_seed(0))
        task.saves_frozen = False
    if changes.pop("codebook", None) == "ema":
        task = TokenizerTask(task.tokenizer, task.examples, codebook=CodebookConfig(update="ema", revive_every=3))
    return task


def break_off(task: Task, at: int) -> None:
    """Make the task's forward pass of a step end as if by Ctrl-C, twice."""

    class Stopping(type(task)):
        def forward(self, batch, noise, step):
            if step == at:
                raise KeyboardInterrupt
            return super().forward(batch, noise, step)

    task.__class__ = Stopping


def shares(task: Task) -> Iterator[tuple[str, float]]:
    """Which share of each parameter this process holds."""
    for name, parameter in task.trained.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        yield name, local.numel() / parameter.numel()


def parse(text: str):
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, value


if __name__ == "__main__":
    sys.exit(run_sessions(Path(sys.argv[1])) if sys.argv[1].endswith(".json") else main(sys.argv[1:]))
