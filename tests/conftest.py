"""Small models and the official implementation's numbers, shared by all tests."""

from __future__ import annotations

import json
import os

# Before torch is imported: threads that wait for one another sleep. Spinning, they take the cores that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from nextscale.backends.cpu.kernels import build
from nextscale.backends.cpu.kernels.compilation import HEADS
from nextscale.checkpoints import build_on_meta
from nextscale.common.precision import is_fast
from nextscale.config.log import read_log
from nextscale.config.model import ModelConfig
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import ConditionConfig, TransformerConfig
from nextscale.doctor.models import randomise
from nextscale.info import condition_flops, scale_flops
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.training.engine.loop import train

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "fixtures"
FIXTURES = ["var_tiny_l2", "var_tiny_nol2", "var_shared", "var_tiny"]


# One thread per worker: two workers with two threads each would wait for one another on a small machine.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


SLOW = ("processes", "rehearsal", "experiments", "doctor", "fast_paths", "build", "moe_train", "evaluate", "tune")
"""Files that begin first: of two workers, one would be left with them at the end."""


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    order = [f"test_{name}.py" for name in SLOW]
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


def examples(count):
    """How many examples a property is tested with: fewer where NEXTSCALE_EXAMPLES gives a share of them."""
    return max(1, round(count * float(os.environ.get("NEXTSCALE_EXAMPLES", 1))))


def needs_kernels(name):
    """Marks a test of the compiled kernels of this file."""
    missing = build.explain_missing(name, HEADS[-1] if name in ("blocks", "training") else build.MAX_VECTORS)
    return pytest.mark.skipif(missing is not None, reason=f"{missing}; the plain way has tests of its own")


@contextmanager
def threads(count):
    """On so many of torch's threads; for properties, whose examples fixtures do not see."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def threads_set():
    """A function that sets torch's threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def seeded():
    """torch's own generator starts anew: where a choice between experts may turn on rounding, it always turns alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@dataclass
class Fixture:
    """One folder of numbers that the official implementation produced."""

    folder: Path
    meta: dict
    io: dict[str, torch.Tensor]

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / "vae.safetensors", self.folder / "var.safetensors"


@pytest.fixture(scope="session", params=FIXTURES)
def official(request) -> Fixture:
    return read_fixture(request.param)


def read_fixture(name: str) -> Fixture:
    folder = GOLDEN / name if (GOLDEN / name).exists() else SHARED / name
    if not folder.exists():
        pytest.skip(f"{name} (11 MB) is not kept in the repository; it is tested where ../shared/fixtures exists")
    return Fixture(folder, json.loads((folder / "meta.json").read_text()), load_file(folder / "io.safetensors"))


def tiny_config(scales: str = "1,2,3,4", **transformer) -> ModelConfig:
    """A generator of 20 thousand parameters over 8-pixel images (for scales that end in 4)."""
    tokenizer = TokenizerConfig(
        vocab_size=32, code_width=4, base_channels=8, channel_multipliers=(1, 1), res_blocks=1, norm_groups=4
    )
    settings = {"depth": 2, "width": 32, "heads": 4, "condition": ConditionConfig(num_classes=5), **transformer}
    return ModelConfig(Pyramid.parse(scales), tokenizer, TransformerConfig(**settings))


def randomised(config: ModelConfig, seed: int = 0, backend: str = "auto") -> Pipeline:
    """A pipeline in which every parameter is random, so that every path matters."""
    pipeline = Pipeline.from_config(config, backend=backend)
    randomise(pipeline, seed)
    return pipeline


@pytest.fixture
def tiny() -> Pipeline:
    return randomised(tiny_config())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    randomised(tiny_config()).save_pretrained(folder)
    return folder


@torch.no_grad()
def check_flops(config: ModelConfig) -> None:
    """What info.py counts by structure equals torch's counter: the condition, and a step at every scale."""
    _, model = build_on_meta(config)
    values = model.condition.nothing(1)
    with FlopCounterMode(display=False) as counter:
        conditioning = model.embed_condition(values)
    assert counter.get_total_flops() == condition_flops(config.transformer)
    cache = model.new_cache(1)
    for k, count in enumerate(config.pyramid.counts):
        x = torch.empty(1, count, config.tokenizer.code_width, device="meta") if k else None
        with FlopCounterMode(display=False) as counter:
            model.step(conditioning, x, k, cache)
        assert counter.get_total_flops() == scale_flops(config, k)


def losses_by_precision(make, settings: TrainConfig, folder: Path) -> dict[str, list[float]]:
    """Losses of each step of the task that `make(settings)` builds: in float32, bfloat16 and float16 (scaled).

    Asserts that low precision changes them, and that recomputing blocks does not."""
    losses = {}
    variants = {n: {"precision": n} for n in ("float32", "bfloat16", "float16")} | {
        "again": {"activation_checkpointing": True}
    }
    for name, changes in variants.items():
        config = replace(settings, **changes)
        train(make(config), config, folder / name)
        losses[name] = [r["loss"] for r in read_log(folder / name / "log.jsonl")]
    assert losses["again"] == losses["float32"]
    for name in ("bfloat16", "float16"):
        fast = is_fast(getattr(torch, name), "cpu")  # otherwise computed in float32
        assert (losses[name] != losses["float32"]) == fast
    return losses
