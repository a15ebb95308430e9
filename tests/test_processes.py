"""Commands by two processes, real ones over gloo: what they leave behind, and how they end when one of them fails.

Every task trains, validates, keeps its best model and draws its pictures, under each way to share the work among
processes that it allows, in float32 or bfloat16. `make soak` (NEXTSCALE_SOAK) runs all combinations.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextscale.config.log import read_log
from nextscale.pipeline import Pipeline
from tests import forked
from tests.conftest import randomised, tiny_config
from tests.process_worker import by_pairs
from tests.test_data import write_folder
from tests.test_run import CONFIG

ROOT = Path(__file__).parents[1]
SOAK = "NEXTSCALE_SOAK" in os.environ
PRECISIONS = ("fp32", "bf16")

GENERATORS = {
    "dense": "",
    "mamba": "--transformer.mixers scale-attention mamba --transformer.mamba.state-width 6 "
    "--transformer.mamba.head-width 8",
    "mixture": "--transformer.experts.router stmoe --transformer.experts.count 4 --transformer.experts.active 2",
}
ALLOWED = {"dense": ("none", "full"), "mamba": ("none", "full"), "mixture": ("none", "full", "experts")}
CHOSEN = {("dense", "none", "bf16"), ("dense", "full", "bf16"), ("mamba", "full", "fp32"), ("mamba", "none", "bf16"),
          ("mixture", "full", "bf16"), ("mixture", "experts", "bf16"), ("mixture", "none", "fp32")}  # fmt: skip
"""What runs in the ordinary suite; the others differ from one of these by one word."""
STEPS = "--train.steps 2 --train.save-every 1"
IMAGES = {
    "tokenizer": "tokenizer train tokenizer.json --data photos",
    "classifier": "classifier train classifier.json --data photos",
    "encoder": "encoder train encoder.json --data photos",
}
SPARSIFY = (
    "--samples 40 --scales 2 --expert-size 16 --router-width 8 --calibration-images 4 --batch-size 4 --device cpu "
    "--budgets 0.95 0.85 --budget 0.85 --stages tune split routers adapt thresholds --tuning.sharding full "
) + " ".join(f"--{n}.epochs 0 --{n}.steps 2 --{n}.batch-size 8 --{n}.save-every 1 --{n}.warmup-epochs 0 "
             f"--{n}.precision bf16" for n in ("tuning", "routers", "adapting"))  # fmt: skip


def train(out: str, words: str = "", data: str = "cache") -> str:
    return f"train c.json --data {data} --tokenizer tokenizer --out {out} --device cpu {STEPS} {words}"


def list_road() -> dict[str, str]:
    """The commands that two processes run one after the other, by name."""
    road = {"tokenize": "tokenize photos --tokenizer tokenizer --out cache --images.held-out 0.25 --shard 7 "
                        "--device cpu"}  # fmt: skip
    for kind, words in GENERATORS.items():
        for sharding in ALLOWED[kind]:
            for precision in PRECISIONS:
                if SOAK or (kind, sharding, precision) in CHOSEN:
                    name = f"{kind}-{sharding}-{precision}"
                    road[name] = train(name, f"{words} --train.sharding {sharding} --train.precision {precision}")
    for name, command in IMAGES.items():
        for precision in PRECISIONS if SOAK else ("bf16",):
            out = f"{name}-{precision}"
            road[out] = f"{command} --out {out} --device cpu {STEPS} --train.precision {precision}"
    road |= {
        "sparsify": f"sparsify tokenizer --out sparse {SPARSIFY}",
        "statistics": "statistics photos --features classifier-bf16 --out ref.npz --device cpu --size 8 --shard 5",
        "evaluate": "evaluate dense-full-bf16 --features classifier-bf16 --reference ref.npz --num 10 --shard 3 "
        "--batch-size 3 --out report.json --device cpu",
    }
    return road


def write_place(folder: Path) -> None:
    """Pictures, a model and configs, for commands that run in this folder."""
    write_folder(folder / "photos")
    randomised(tiny_config()).save_pretrained(folder / "tokenizer")
    images, run = {"held_out": 0.25}, CONFIG["train"]
    few = {name: run[name] for name in ("steps", "batch_size", "micro_batch", "log_every", "warmup_steps", "ema")}
    codes = {"vocab_size": 32, "code_width": 4, "base_channels": 8, "channel_multipliers": [1, 1], "res_blocks": 1,
             "norm_groups": 4}  # fmt: skip
    configs = {
        "c": CONFIG,
        "tokenizer": {"images": images, "train": few, "tokenizer": codes, "image_size": 8, "scales": "1,2,4"},
        "classifier": {"images": images, "train": few, "shift": 1,
                       "classifier": {"image_size": 8, "widths": [8], "groups": 4}},
        "encoder": {"images": images, "train": few,
                    "encoder": {"image_size": 8, "widths": [8, 16], "blocks": [1, 1], "groups": 4},
                    "moco": {"queue": 16, "key_width": 8}},
    }  # fmt: skip
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_place(folder)
    return folder


STOPPED = ("dense-full-bf16", "mixture-experts-bf16", "tokenizer-bf16")
"""Commands that are stopped by SIGTERM in their first step, whose state is saved, and started again."""


@pytest.fixture(scope="module")
def road(place) -> dict[str, list[dict]]:
    """What two processes said to each command that torchrun's pair ran, [rank]; their files are in `place`."""
    commands = list_road()
    plan = {name: {"command": command} for name, command in commands.items()}
    for name in STOPPED:
        again = {"command": commands[name].replace(f"--out {name}", f"--out again-{name}")}
        plan |= {f"stopped-{name}": again | {"mishap": "stop 1 0"}, f"again-{name}": again}
    (path := place / "road.plan").write_text(json.dumps(list(plan.values())))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "tests.process_worker", str(path)]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [json.loads(Path(f"{path}.{rank}.said").read_text()) for rank in range(2)]
    return {name: [said[rank][i] for rank in range(2)] for i, name in enumerate(plan)}


@pytest.mark.parametrize("name", list_road())
def test_two_processes_run_it(name, road, place):
    """Each command ends well, and a training has a validation and a best model."""
    for rank in range(2):
        assert road[name][rank]["status"] == 0, road[name][rank]["text"][-2000:]
    runs = [place / name]
    if name == "sparsify":
        runs = [place / "sparse" / "stages" / stage for stage in ("tune", "routers", "adapt")]
    elif name in ("tokenize", "statistics", "evaluate", "encoder-bf16", "encoder-fp32"):
        runs = []  # an encoder is measured by labels, and not chosen by them
    for run in runs:
        log = read_log(run / "log.jsonl")
        losses = {r["step"]: r["validation_loss"] for r in log if "validation_loss" in r}
        (best,) = (run / "training").glob("*-best.json")
        assert losses.keys() == {1, 2}
        assert losses[json.loads(best.read_text())["step"]] == min(losses.values())
        assert name == "sparsify" or (run / "best" / "config.json").is_file()
    if name.startswith(tuple(GENERATORS)):
        assert (place / name / "samples.png").is_file()
        Pipeline.from_pretrained(place / name).sample([0])


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_and_started_again(name, road, place):
    """Bit for bit; the validation that the stop left undone is made up for, and stands in the log once."""
    for rank in range(2):
        assert [road[f"{what}-{name}"][rank]["status"] for what in ("stopped", "again")] == [130, 0]
    assert sum(road[f"stopped-{name}"][rank]["text"].count("interrupted while training") for rank in range(2)) == 1
    check_equal(place, name, f"again-{name}")


def check_equal(place: Path, whole: str, parts: str) -> None:
    """Two runs have the same models, states and logs."""
    files = {path.relative_to(place / whole) for path in (place / whole).rglob("*.safetensors")}
    assert {path.relative_to(place / parts) for path in (place / parts).rglob("*.safetensors")} == files
    for file in files:
        assert (place / parts / file).read_bytes() == (place / whole / file).read_bytes(), file
    logs = [read_log(place / run / "log.jsonl") for run in (whole, parts)]
    for record in logs[0] + logs[1]:
        record.pop("images_per_s", None), record.pop("tokens_per_s", None)
    assert logs[0] == logs[1]


@pytest.mark.skipif(not SOAK, reason="make soak starts two launchers")
@pytest.mark.parametrize("mishap", ["", "kill 1 1"])
def test_two_nodes(mishap, road, place):
    """Two torchruns of one process each, as on two machines, train what two processes of one torchrun train; and when
    the second one's process is killed, the first one says so."""
    name = "dense-full-bf16"
    out = f"nodes{mishap.replace(' ', '-')}"
    entry = {"command": list_road()[name].replace(f"--out {name}", f"--out {out}")}
    (plan := place / f"{out}.plan").write_text(json.dumps([entry | ({"mishap": mishap} if mishap else {})]))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    common = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={forked.find_port()}"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *common, f"--node-rank={rank}", "-m",
             "tests.process_worker", str(plan)],
            cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=200)[0] for node in nodes]
    if not mishap:
        assert [node.returncode for node in nodes] == [0, 0], said
        check_equal(place, name, out)
    else:
        assert 0 not in [node.returncode for node in nodes]
        assert "rank 1 of 2 failed: the process" in said[0]
        assert (place / out / "training" / "transformer-00000001.pt").exists()


MISHAPS = {
    "kill 1 1": ("mixture-experts-bf16", "ended without a word: it was killed"),
    "kill 0 1": ("dense-full-bf16", "ended without a word: it was killed"),
    "disk 0 1": ("mamba-full-fp32", "cannot write"),
    "nan 1 1": ("mixture-none-fp32", "loss nan and gradient norm nan at step 1 are not both finite"),
    "user 1 1": ("classifier-bf16", "the cat sat on the keyboard"),
    "bug 0 1": ("tokenizer-bf16", "IndexError: a defect"),
    "worker 1 0": ("dense-none-bf16", "DataLoader worker"),
    "kill 1 0": ("tokenize", "ended without a word: it was killed"),
    "user 1 0": ("evaluate", "the cat sat on the keyboard"),
}
"""What happens to a rank, in which command, and what the other one says of it."""


@pytest.fixture(scope="module")
def failed(road, place) -> dict[str, tuple[dict, dict]]:
    """What pairs of processes said to commands in which something happened to one, and to the same command again."""
    commands, plan = list_road(), []
    for mishap, (name, _) in MISHAPS.items():
        out = mishap.replace(" ", "-")
        command = commands[name].replace(f"--out {name}", f"--out {out}").replace("--out cache", f"--out {out}")
        command = command.replace("--out report.json", f"--out {out}.json")
        command += " --train.workers 1 --train.micro-batch 1" if mishap.startswith("worker") else ""
        plan += [{"command": command, "mishap": mishap}, {"command": command}]
    (path := place / "failed.plan").write_text(json.dumps(plan))
    status, _, err = forked.start(by_pairs, path, files=place / "failed").end(900)
    assert status == 0, err[-4000:]
    said = json.loads(Path(f"{path}.said").read_text())
    return {mishap: (said[2 * i], said[2 * i + 1]) for i, mishap in enumerate(MISHAPS)}


@pytest.mark.parametrize("mishap", MISHAPS)
def test_when_one_process_fails_the_other_says_so_and_ends(mishap, failed, place):
    """Within a minute, in one line each; what was saved is whole, and the same command goes on from it."""
    (name, cause), (first, second) = MISHAPS[mishap], failed[mishap]
    kind, rank, _ = mishap.split()
    other, out = 1 - int(rank), mishap.replace(" ", "-")
    assert first["seconds"] < 60
    assert first["status"][int(rank)] == {"kill": -9, "bug": 1}.get(kind, 2), first["text"]
    assert first["status"][other] == (1 if kind in ("kill", "bug") else 2), first["text"]
    for each in {other, *([] if kind == "kill" else [int(rank)])}:
        lines = [line for line in first["text"][each].splitlines() if line.startswith("nextscale: error: ")]
        assert len(lines) == 1, first["text"][each]
        assert cause in lines[0]
        assert (f"rank {rank} of 2 failed: " in lines[0]) == (each == other)
        assert "Traceback" not in first["text"][each]
    assert second["status"] == [0, 0], second["text"]
    if name == "tokenize":
        for shard in (place / "cache").glob("*.safetensors"):
            assert (place / out / shard.name).read_bytes() == shard.read_bytes()
    elif name == "evaluate":
        reports = [json.loads((place / file).read_text())["measures"] for file in ("report.json", f"{out}.json")]
        assert reports[0] == reports[1]
    elif kind != "worker":  # whose micro-batches are others
        check_equal(place, name, out)
