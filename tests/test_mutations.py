"""Some hundreds of damaged files of every kind: each gives the same result as before, or one line that names the file.

The damage is drawn with a fixed seed. Each kind of file has a function that writes a sound folder and one that uses it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.checkpoints.official import import_official
from nextscale.checkpoints.official_files import read_tensors
from nextscale.checkpoints.official_shapes import Hints
from nextscale.common import notes
from nextscale.common.digest import add_digest, compute_digest
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.encoder import EncoderConfig
from nextscale.config.files import read_settings
from nextscale.config.log import read_log
from nextscale.config.parse import read_record, to_dict
from nextscale.config.transformer_training import LossConfig, RunConfig
from nextscale.data.cache import TokenCache
from nextscale.encoders.classifier import Classifier
from nextscale.encoders.load import load_encoder, load_feature_network
from nextscale.encoders.self_supervised import SmallEncoder
from nextscale.evaluation.images import NpzImages
from nextscale.evaluation.reference import Reference, read_npz
from nextscale.pipeline import Pipeline
from nextscale.research.experiments.records import (
    read_costs,
    read_data_name,
    read_finished,
    read_flops,
    read_measures,
    read_threshold,
)
from nextscale.sparsify.stages import _Thresholds
from nextscale.training.engine.log import JsonLog
from nextscale.training.engine.loop import train
from nextscale.training.engine.state import StateFiles, check_settings
from nextscale.training.open_run import Run
from nextscale.training.transformer import read_run_config
from tests.conftest import randomised, read_fixture, tiny_config
from tests.test_damaged_shards import extract, write_cache
from tests.test_state_dicts import ANCHOR, write_shards
from tests.test_train import SETTINGS, tasks


@dataclass(frozen=True)
class Kind:
    """A kind of folder."""

    write: Callable[[Path], None]
    use: Callable[[Path], Any]
    """The result of reading the folder, which is compared."""
    binary: int = 0
    """How many times bytes of its files are damaged."""
    fields: int = 0
    """How many times fields of its JSON files are damaged."""
    edits_differ: bool = False
    """Settings that people write: another value is another result."""


def digest(**tensors: torch.Tensor) -> str:
    return compute_digest(tensors)


def use_model(folder):
    images = Pipeline.from_pretrained(folder, backend="plain").sample([1, None], seed=3)
    return digest(tokens=images.tokens, images=images.tensor), images.captions


def use_cache(folder):
    cache, read = TokenCache(folder), {}
    for split in ("train", "held_out"):
        examples = cache.load_examples(split)
        batch = examples.fetch(range(len(examples)), range(len(examples)))
        read |= {f"{split} {name}": tensor for name, tensor in batch.items()}
    return digest(**read), cache.class_names


RUN = {"data": "digits", "train": to_dict(replace(SETTINGS, steps=2))}


def write_run(folder):
    train(tasks(randomised(tiny_config()))[0], replace(SETTINGS, steps=2), folder, settings=RUN)
    (folder / "run.json").write_text(json.dumps(RUN))
    StateFiles(folder, "tokenizer", 2, World()).record_best(2, {"validation_loss": 0.25})


def use_run(folder):
    check_settings(folder, RUN, accept_changes=False)
    files = StateFiles(folder, "tokenizer", 2, World())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        content, path = files._read_latest()
    if content is None:
        raise UserError("; ".join(str(note.message) for note in said))
    return digest(**content["module"]), content["step"], path.name, str(files.read_best())


def use_network(folder):
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    features = load_feature_network(str(folder))(images)
    return digest(pool=features.pool_BD, logits=features.logits_BC)


def use_encoder(folder):
    return digest(features=load_encoder(str(folder))(torch.linspace(-1, 1, 192).view(1, 3, 8, 8), (4, 4)))


def write_official(folder):
    from safetensors.torch import load_file

    for source in read_fixture("var_tiny_l2").files:
        torch.save(load_file(source), folder / f"{source.stem}.pth")


def use_official(folder):
    checkpoint = import_official(folder / "vae.pth", folder / "var.pth", Hints())
    return digest(**checkpoint.tokenizer), digest(**checkpoint.transformer), str(checkpoint.config)


def write_statistics(folder):
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    Reference.compute("here", {"pool": features}, "classifier", "00ff").save(folder / "statistics.npz", 8)


def use_statistics(folder):
    reference = read_npz(folder / "statistics.npz").to_reference()
    moments = reference.moments["pool"]
    parts = digest(mean=moments.mean_D, covariance=moments.covariance_DD, pool=reference.pool_MD)
    return parts, reference.network, reference.fingerprint, reference.images


def write_samples(folder):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", images, np.arange(6) % 2)


def use_samples(folder):
    images = NpzImages(folder / "samples.npz")
    return digest(images=images.fetch(0, 6), labels=images.labels())


def write_run_settings(folder):
    settings = to_dict(RunConfig(data="digits", tokenizer="x", train=replace(SETTINGS, steps=2)))
    Run(folder, settings, World()).record({}, accept_changes=False)
    (folder / "inputs.json").unlink()


def use_run_settings(folder):
    """What `nextscale resume` and experiments read of run.json."""
    config = read_run_config(folder)
    check_settings(folder, to_dict(config), accept_changes=False)
    return str(config), read_data_name(folder)


def write_log(folder):
    """Three tasks in one log, as a quickstart's."""
    for task in ("tokenizer", "encoder", "transformer"):
        log = JsonLog(folder / "log.jsonl", task, 0)
        for step in range(1, 13):
            log.write(step, {"loss": 1.5 / step, "per_scale": [0.25, step / 7], "learning_rate": 1e-4})
            if step % 4 == 0:
                log.write(step, {"validation_loss": 2.0 / step})


def use_log(folder):
    """The records by task and step. Lines that are passed over are named in a note, which counts as a refusal."""
    notes._counts.clear()
    notes._printed.clear()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        records = read_log(folder / "log.jsonl")
    if said.getvalue():
        raise UserError(said.getvalue().removesuffix("\n"))
    steps = {task: [r["step"] for r in records if r["task"] == task] for task in {r["task"] for r in records}}
    return sorted(json.dumps(record) for record in records), steps


def write_table(**values):
    """A function that writes a JSON table with its digest, as experiments do."""
    return lambda folder: (folder / "table.json").write_text(json.dumps(add_digest(values))) and None


def write_settings(folder):
    (folder / "settings.yaml").write_text(
        "train: {steps: 20, betas: [0.9, 0.95], learning_rate: 1e-3}\ntransformer:\n  depth: 2\n  mixers: [attention]\n"
        "  condition:\n    num_classes: 5\nscales: 1,2,3x4\n"
    )
    (folder / "settings.json").write_text(json.dumps({"train": to_dict(SETTINGS), "loss": to_dict(LossConfig())}))


def use_settings(folder):
    return [str(read_settings(RunConfig, folder / name)) for name in ("settings.yaml", "settings.json")]


def write_finished(folder):
    values = {"validation_loss": 2.5, "validation_loss_per_scale": [2.0, 3.0], "settings": {"data": "x", "seed": 3}}
    (folder / "finished.json").write_text(json.dumps(add_digest(values)))


KINDS = {
    "model": Kind(
        lambda f: randomised(replace(tiny_config(), class_names=tuple("abcde"))).save_pretrained(f), use_model, 60, 60
    ),
    "cache": Kind(write_cache, use_cache, 60, 60),
    "run": Kind(write_run, use_run, 20, 30),
    "classifier": Kind(
        lambda f: Classifier(ClassifierConfig(8, (16,), 8), ("a", "b")).save(f), use_network, 30, 30
    ),
    "encoder": Kind(lambda f: SmallEncoder(EncoderConfig(8, (16,), (1,), 8)).save(f), use_encoder, 30, 30),
    "features": Kind(lambda f: extract(f), lambda f: digest(**extract(f)), 30, 20),
    "statistics": Kind(write_statistics, use_statistics, 60),
    "samples": Kind(write_samples, use_samples, 60),
    "official": Kind(write_official, use_official, 30),
    "index of shards": Kind(
        lambda f: write_shards(f, "safetensors") and None,
        lambda f: digest(**read_tensors(f / "model.safetensors.index.json", ANCHOR)), 0, 20,
    ),
    "finished training": Kind(write_finished, lambda f: str(read_finished(f, 2)), 15, 30),
    "thresholds": Kind(
        lambda f: (f / "tau.json").write_text(json.dumps(add_digest({"about": {"data": "x"}, "tau": [0.5, 0.25]}))),
        lambda f: str(read_record(_Thresholds, f / "tau.json")), 15, 15,
    ),
    "threshold": Kind(write_table(tau=0.375), lambda f: read_threshold(f / "table.json"), 20, 20),
    "FLOPs": Kind(write_table(gflop=1.25, flops_share=0.5), lambda f: str(read_flops(f / "table.json")), 20, 20),
    "times": Kind(
        write_table(about="x", rows=[{"seconds": 0.5}, {"seconds": 0.25}]),
        lambda f: str(read_costs(f / "table.json", 2)), 20, 20,
    ),
    "report": Kind(
        write_table(source="m", measures={"net": {"fid": 2.5, "images": 50}}),
        lambda f: str(read_measures(f / "table.json")), 20, 20,
    ),
    "settings of a run": Kind(write_run_settings, use_run_settings, 40, 60),
    "log": Kind(write_log, use_log, 150),
    "settings": Kind(write_settings, use_settings, 15, 20, edits_differ=True),
}  # fmt: skip


# ---- damage


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_near_the_start(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(min(len(content), 400))] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def zero_the_tail(content: bytearray, rng: random.Random) -> None:
    count = rng.randrange(1, len(content))
    content[-count:] = bytes(count)


def nest(content: bytearray, rng: random.Random) -> None:
    content[:] = b"[" * 10_000


def change_a_digit(content: bytearray, rng: random.Random) -> None:
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    place = rng.choice(places)
    content[place] = ord(str((int(chr(content[place])) + rng.randrange(1, 10)) % 10))


def change_a_line(content: bytearray, rng: random.Random) -> None:
    """Exchange two lines, or put something that is no record in the place of one or after it."""
    lines = bytes(content).splitlines(keepends=True)
    first, second = rng.sample(range(len(lines)), 2)
    odd = rng.choice(
        [b"null\n", b"{}\n", b"[1]\n", b"\0\0\n", lines[first][: len(lines[first]) // 2] + b"\n", b"exchange"]
    )
    if odd == b"exchange":
        lines[first], lines[second] = lines[second], lines[first]
    else:
        lines[first : first + rng.randrange(2)] = [odd]
    content[:] = b"".join(lines)


def damage_log(folder: Path, rng: random.Random) -> tuple[list[Path], str]:
    """Damage the log. It is not cut: a log that ends early is that of a run that was stopped."""
    file, way = folder / "log.jsonl", rng.choice([flip, change_a_digit, change_a_digit, change_a_line, zero_the_tail])
    content = bytearray(file.read_bytes())
    way(content, rng)
    file.write_bytes(content)
    return [file], way.__name__


def damage_bytes(folder: Path, rng: random.Random) -> tuple[list[Path], str]:
    """Damage one file or exchange two; return them and what was done."""
    if (folder / "log.jsonl").exists() and len(list(folder.iterdir())) == 1:
        return damage_log(folder, rng)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix not in (".png", ".jsonl", ".md"))
    file = rng.choice(files)
    alike = [f for f in files if f != file and f.suffix == file.suffix]
    way = rng.choice([flip, flip, flip_near_the_start, cut, zero_the_tail, nest, "exchange", "copy", "remove"])
    if way in ("exchange", "copy") and alike:
        other = rng.choice(alike)
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        if way == "exchange":
            other.write_bytes(content)
        return [file, other], f"{way} with {other.name}"
    if way == "remove" and file.name.endswith("-best.json"):
        way = "flip"  # a run that was not validated yet has no such file
    if way == "remove":
        file.unlink()
        return [file], way
    way = flip if isinstance(way, str) else way
    content = bytearray(file.read_bytes())
    way(content, rng)
    file.write_bytes(content)
    return [file], way.__name__


ODD_VALUES = [None, True, -1, 0, 1.5, 1e30, 10**30, 2**31, "", "x", "9" * 400, [], {}, [[1]], {"a": 1}, -1.0, 10**6,
              float("inf"), float("nan")]  # fmt: skip


def list_places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The path of every entry of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        yield (*place, name)
        yield from list_places(entry, (*place, name))


def damage_field(folder: Path, rng: random.Random) -> tuple[list[Path], str]:
    """Remove, rename, replace or negate one entry of a JSON file, or nest it deeply; return file and what was done."""
    file = rng.choice(sorted(folder.rglob("*.json")))
    table = json.loads(file.read_text())
    *path, name = rng.choice(list(list_places(table)))
    holder = table
    for step in path:
        holder = holder[step]
    before = copy.deepcopy(holder[name])
    way = rng.choice(["remove", "rename", "replace", "replace", "replace", "negate", "nest"])
    if way == "remove" and file.name.endswith("-best.json"):
        way = "flip"  # a run that was not validated yet has no such file
    if way == "remove":
        del holder[name]
    elif way == "rename" and isinstance(holder, dict):
        holder[f"{name}x"] = holder.pop(name)
    elif way == "negate" and isinstance(before, int | float):
        holder[name] = (not before) if isinstance(before, bool) else -before
    elif way == "nest":
        for _ in range(100):
            holder[name] = [holder[name]]
    else:
        holder[name] = rng.choice([odd for odd in ODD_VALUES if odd != before])
    file.write_text(json.dumps(table))
    where, now = ".".join(map(str, [*path, name])), repr(holder.get(name) if isinstance(holder, dict) else holder)
    return [file], f"{way} {where}: {before!r} to {now[:100]}"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """A hang fails."""

    def fail(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(kind: Kind, folder: Path, files: list[Path], before: Any) -> str:
    """What is wrong with the outcome of using a damaged folder; empty when nothing is."""
    try:
        with time_limit(20):
            after = kind.use(folder)
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 2500:
            return f"not one line: {text!r}"
        names = {
            name for file in files for name in (file.name, file.name.replace(".json", ".pt"))
        }  # a state's checksum
        named = any(name in text for name in names)
        return "" if named else f"does not name {files[0].name}: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if after == before or kind.edits_differ else f"another result: {after} instead of {before}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tmp_path_factory.mktemp("sound")


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named_or_changes_nothing(name, sound, tmp_path):
    kind, rng, faults = KINDS[name], random.Random(name), []
    (sound / name).mkdir()
    kind.write(sound / name)
    before = kind.use(sound / name)
    for damage, count in ((damage_bytes, kind.binary), (damage_field, kind.fields)):
        for _ in range(count):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(sound / name, tmp_path / name)
            files, done = damage(tmp_path / name, rng)
            fault = judge(kind, tmp_path / name, files, before)
            if fault:
                faults.append(f"{files[0].relative_to(tmp_path)}, {done}: {fault}")
    assert not faults, f"{len(faults)} of {kind.binary + kind.fields}:\n" + "\n".join(f[:400] for f in faults)
