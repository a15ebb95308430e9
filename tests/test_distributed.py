"""Several processes, real ones over gloo: they compute what one does, and their states are interchangeable.

Processes are slow to start, so two of them train all cases one after the other; one goes on with what those left, and
then two new ones. What is compared with them one process does here.
"""

import json
from pathlib import Path

import pytest
import torch

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.precision import is_fast
from nextscale.config.log import read_log
from nextscale.config.training import TrainConfig
from nextscale.training.engine.distributed import DistributedModel
from tests import forked
from tests.train_worker import build, parse, run_sessions, train_case

EQUAL = {
    "codebook": "0 codebook=ema",
    "encoder": "2",
    "full, dense": "1 sharding=full ema=0.9 activation_checkpointing=1",
    "full, mamba": "1 sharding=full mixers=mvar activation_checkpointing=1",
    "full, combined": "1 sharding=full condition=combined ema=0.9 activation_checkpointing=1",
    "full, expert-choice": "1 sharding=full router=expert-choice ema=0.9 activation_checkpointing=1",
    "full, moe++": "1 sharding=full router=moe++",
    "experts, stmoe": "1 sharding=experts router=stmoe ema=0.9 activation_checkpointing=1",
    "experts, moe++": "1 sharding=experts router=moe++ frozen=experts.fc1",
    "none, shared": "1 sharding=none router=stmoe shared=1 ema=0.9",
    "full, shared": "1 sharding=full router=stmoe shared=1 ema=0.9 activation_checkpointing=1",
    "none, sizes": "1 sharding=none sizes=1 ema=0.9",
    "full, sizes": "1 sharding=full sizes=1 activation_checkpointing=1",
    "none, adapters": "1 sharding=none router=stmoe lora=2",
    "full, adapters": "1 sharding=full router=stmoe shared=1 lora=2 ema=0.9",
    "experts, adapters": "1 sharding=experts router=stmoe lora=2",
}
EQUAL = {name: f"{words} steps=6 micro_batch=2" for name, words in EQUAL.items()}
EQUAL |= {  # over the images that are computed at once: by one process as many as by two
    f"{sharding}, over the batch": f"1 sharding={sharding} router=stmoe over=batch validate=1 steps=6"
    for sharding in ("none", "full", "experts")
}
LOW = {
    **{f"full, {r}": f"1 sharding=full router={r}" for r in ("stmoe shared=1", "smoe", "expert-choice", "moe++")},
    "full, dense": "1 sharding=full",
    "experts, smoe": "1 sharding=experts router=smoe",
}
LOW = {
    f"bf16 {name}": f"{words} precision=bfloat16 steps=3 ema=0.9 save_every=2 validate=1" for name, words in LOW.items()
}
BACK = {
    "adapters": "1 sharding=full lora=2",
    "none": "1 sharding=none",
    "full": "1 sharding=full router=stmoe shared=1",
    "experts": "1 sharding=experts router=smoe",
}
BACK = {
    # the same learning rate throughout, however many steps there are
    f"back {name}": f"{words} ema=0.9 accept=1 final_learning_rate=1e-3"
    for name, words in BACK.items()
}
RESUMED = "1 sharding=experts router=stmoe over=batch ema=0.9 micro_batch=2 steps=6"


def alone(folder: Path, words: str) -> Path:
    """One case by one process."""
    which, *changes = words.split()
    train_case(folder, int(which), dict(map(parse, changes)), World())
    return folder


def in_sessions(root: Path, *sessions: tuple[int, dict[Path, str]]) -> None:
    """(processes, cases) one after the other, each by so many new processes."""
    words = [
        (size, [word for folder, case in cases.items() for word in ("--", str(folder), *case.split())])
        for size, cases in sessions
    ]
    (root / "sessions.json").write_text(json.dumps(words))
    status, _, err = forked.start(run_sessions, root / "sessions.json", files=root / "said").end()
    assert status == 0, err[-3000:]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two(tmp_path_factory, one_thread) -> Path:
    """A folder of what two processes have trained; what went on by one process, then by two new ones, or by two new
    ones at once."""
    root = tmp_path_factory.mktemp("two")
    cases = {root / name: words for name, words in (EQUAL | LOW).items()}
    cases |= {root / "whole": RESUMED, root / "resumed": f"{RESUMED} save_every=3 stop=4"}
    first, second, third = (
        {root / name: f"{words} steps={steps}" for name, words in BACK.items()} for steps in (2, 4, 6)
    )
    in_sessions(root, (2, cases | first), (1, second), (2, third | {root / "resumed": RESUMED}))
    return root


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "final.pt", weights_only=True)


def difference(a: dict, b: dict) -> float:
    """Largest difference of the weights, relative to the largest weight of a tensor, or to 0.01 where that is smaller:
    biases that began at 0 are as small as a few steps.

    Without the biases of the tokenizer's keys: they shift all scores of a query alike, so they change nothing, and
    their gradient is rounding error, which Adam makes a whole step of.
    """
    assert a.keys() == b.keys()
    worst = 0.0
    for name in a:
        x, y = a[name].double(), b[name].double()
        if name.endswith("qkv.bias"):
            x, y = (torch.cat(t.chunk(3)[::2]) for t in (x, y))
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-2)))
    return worst


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one_that_accumulates(name, two, tmp_path):
    """Steps of six examples in micro-batches of two, by one process and by two: label drop, stochastic depth, the
    codebook's moving averages and revival, an encoder's queue of keys, and experts that are not trained included."""
    rounding = 1e-5 if name == "encoder" else 1e-6
    assert difference(final(alone(tmp_path, EQUAL[name])), final(two / name)) < rounding


@pytest.mark.parametrize("name", LOW)
def test_in_bfloat16_two_processes_stay_near_one_in_float32(name, two, tmp_path):
    """In validation too, where FSDP2 gives its blocks rounded weights. Routers are not rounded at all: by scales alone
    (SMoE) their scores, so the balance loss, are the same."""
    words = LOW[name].replace("precision=bfloat16", "")
    one, low = (read_log(folder / "log.jsonl") for folder in (alone(tmp_path, words), two / name))
    for key in ("loss", "gradient_norm", "validation_loss", "validation_loss_per_scale"):
        exact, rounded = ([r[key] for r in records if key in r] for records in (one, low))
        assert len(rounded) == (2 if "validation" in key else 3)
        assert rounded == [pytest.approx(value, rel=0.03) for value in exact]
        if is_fast(torch.bfloat16, "cpu"):
            assert rounded[0] != exact[0]
        else:  # such a CPU computes in float32
            assert rounded[0] == pytest.approx(exact[0], rel=1e-5)
    if "smoe" in name:
        assert low[0]["balance"] == pytest.approx(one[0]["balance"], rel=1e-6)


@pytest.mark.parametrize("name", BACK)
def test_a_state_of_two_processes_goes_on_with_one_and_back(name, two, tmp_path):
    assert difference(final(alone(tmp_path, f"{BACK[name]} steps=6")), final(two / name)) < 1e-6


def test_experts_interrupted_and_resumed_equal_uninterrupted(two):
    """Bit for bit: two processes broke off in step 5, after the state of step 3; two others went on."""
    whole, resumed = final(two / "whole"), final(two / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_each_process_holds_its_share(two):
    for name, divided in (("experts, stmoe", "ffn.experts."), ("full, moe++", ""), ("codebook", None)):
        for rank in range(2):
            held = json.loads((two / name / f"held-{rank}.json").read_text())
            for parameter, share in held.items():
                # a first dimension of 1 cannot be divided: one process holds all of it
                wanted = 0.5 if divided is not None and divided in parameter else 1
                assert share == wanted or (name.startswith("full") and share in (0, 1)), parameter


def test_what_is_not_trained_stays(two):
    """Dividing experts among processes does not make them be trained."""
    start = build(1, {"router": "moe++"}).trained.state_dict()
    frozen = {name for name in start if "experts.fc1" in name}
    for name, tensor in final(two / "experts, moe++").items():
        assert torch.equal(tensor, start[name]) == (name in frozen), name


def test_what_cannot_be_divided_is_refused():
    """Four experts by three processes; a dense model, also by one process; and the loss scale of float16."""
    config = TrainConfig(sharding="experts")
    with pytest.raises(UserError, match="4 experts cannot be divided evenly among 3 processes"):
        DistributedModel(build(1, {"router": "stmoe"}), config, World(0, 3))
    for processes in (1, 2):
        with pytest.raises(UserError, match="sharding: experts needs a mixture of experts; the transformer has none"):
            DistributedModel(build(1, {}), config, World(0, processes))
    with pytest.raises(UserError, match="precision float16 does not go with sharding experts, use bfloat16"):
        TrainConfig(sharding="experts", precision="float16")
