"""Work is used again only when what it was made of is unchanged; what changed is named."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.common.fingerprint import fingerprint_files, fingerprint_path
from nextscale.common.inputs import INPUTS, check_inputs, compare_inputs, discard_stale
from nextscale.config.transformer import ConditionConfig
from nextscale.data.inputs import describe_data
from nextscale.data.sources import open_source
from tests.conftest import randomised, tiny_config


def write_images(folder, count=12, classes=("cat", "dog"), seed=0, side=32):
    """Noise in the folders of classes, in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = folder / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(place / f"{i:03d}.bmp")
    return folder


def describe(folder):
    return {"data": describe_data(open_source(str(folder), 8))}


def touch(folder, seconds=5):
    for file in folder.rglob("*.*"):
        os.utime(file, ns=(0, file.stat().st_mtime_ns + seconds * 10**9))


def test_what_changed_in_a_folder_is_said(tmp_path):
    folder = write_images(tmp_path / "pictures")
    before = describe(folder)
    assert compare_inputs(before, describe(folder)) == ((), ())
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert compare_inputs(before, describe(moved)) == ((), ()), "the path does not count"
    touch(folder)
    (text,) = compare_inputs(before, describe(folder)).changed
    assert text == f"the files of {folder} have other modification times, with equal names and sizes"
    (folder / "cat" / "extra.bmp").write_bytes(b"1234")
    size = 12 * (folder / "dog" / "001.bmp").stat().st_size
    changed = compare_inputs(before, describe(folder)).changed
    assert changed[0].startswith(f"the files of {folder} have changed: 12 files, {size:,} bytes before, 13 files, ")
    (folder / "cat" / "extra.bmp").unlink()
    (folder / "dog").rename(folder / "ant")
    words = "; ".join(compare_inputs(before, describe(folder)).changed)
    assert f"the classes of {folder} were cat, dog, now ant, cat" in words
    assert "as before, other names or sizes" in words
    assert compare_inputs({}, before).unknown == ("data",)
    partly = {"data": {key: value for key, value in before["data"].items() if key != "modified"}}
    assert compare_inputs(partly, before) == ((), ("data (modified)",))


def test_labels_of_a_table_count(tmp_path):
    folder = write_images(tmp_path / "flat", classes=("",))
    files = sorted(f.name for f in folder.iterdir())
    described = []
    for labels in (("a", "b"), ("b", "a")):
        rows = [f"{name},{labels[i % 2]}" for i, name in enumerate(files)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
        described.append(describe(folder))
    assert compare_inputs(*described).changed == (f"the labels of {folder} have changed",)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6, unique_by=lambda t: t[0]))
def test_files_are_compared_as_a_plain_table_of_them_is(tmp_path_factory, parts):
    """Names, sizes and times of random files against themselves, in any order, and with each one changed."""
    root = tmp_path_factory.mktemp("files")
    files = [root / f"{name}.bin" for name, _ in parts]
    for file, (_, size) in zip(files, parts, strict=True):
        file.write_bytes(b"x" * size)
    before = fingerprint_files(files, root)
    assert fingerprint_files(files[::-1], root) == before
    assert (before["files"], before["bytes"]) == (len(parts), sum(size for _, size in parts))
    for file, (_, size) in zip(files, parts, strict=True):
        stat = file.stat()
        file.write_bytes(b"x" * (size + 1))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after = fingerprint_files(files, root)
        assert {key for key in before if before[key] != after[key]} == {"bytes", "names"}
        file.write_bytes(b"y" * size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
        after = fingerprint_files(files, root)
        assert {key for key in before if before[key] != after[key]} == {"modified"}
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_content_of_small_files_and_of_folders_with_digests(tmp_path):
    file = tmp_path / "a.npz"
    file.write_bytes(b"one")
    before = fingerprint_path(file)
    os.utime(file, ns=(0, 1))
    assert fingerprint_path(file) == before, "the content counts, not the time"
    file.write_bytes(b"two")
    assert compare_inputs({"file": before}, {"file": fingerprint_path(file)}).changed == (
        f"the content of {file} has changed",
    )
    randomised(tiny_config()).save_pretrained(tmp_path / "model")
    before = fingerprint_path(tmp_path / "model")
    touch(tmp_path / "model")
    assert fingerprint_path(tmp_path / "model") == before, "config.json has the digests of the weights"
    randomised(tiny_config(), seed=9).save_pretrained(tmp_path / "model")
    assert fingerprint_path(tmp_path / "model") != before
    assert fingerprint_path("owner/name") == {"where": "owner/name"}


def test_a_record_of_an_earlier_version_is_accepted_with_a_note(tmp_path, capsys):
    inputs = {"data": {"where": "x", "content": "1"}, "seed": 3}
    begun = tmp_path / "run.json"
    check_inputs(tmp_path / INPUTS, inputs, begun, "go away")
    begun.write_text("{}")
    check_inputs(tmp_path / INPUTS, inputs, begun, "go away")
    assert "does not record all that it was made of" in capsys.readouterr().out
    (tmp_path / INPUTS).write_text(json.dumps(inputs | {"seed": 2}))
    with pytest.raises(UserError, match=r"was made of other inputs: seed was 2, now 3; go away"):
        check_inputs(tmp_path / INPUTS, inputs, begun, "go away")
    check_inputs(tmp_path / INPUTS, inputs, begun, "go away", accept=True)
    assert "accepted for" in capsys.readouterr().out


def test_stale_work_is_deleted_and_named(tmp_path, capsys):
    record, work = tmp_path / "features.json", tmp_path / "features-00000.safetensors"
    discard_stale(record, {"images": 3}, "features-*", "features")
    work.touch()
    discard_stale(record, {"images": 3}, "features-*", "features")
    assert work.exists()
    assert capsys.readouterr().out == ""
    for spoil in (lambda: record.write_text('{"images": 4}'), lambda: record.write_text("{}"),
                  lambda: record.write_text("{")):  # fmt: skip
        work.touch()
        spoil()
        discard_stale(record, {"images": 3}, "features-*", "features")
        assert not work.exists()
        assert "note: features in" in capsys.readouterr().out


def test_tokenize_and_train_refuse_data_that_changed_and_say_when_nothing_is_written(tmp_path, capsys):
    """`tokenize` into an existing cache kept the tokens of the old images and said "wrote"."""
    data = write_images(tmp_path / "pictures")
    randomised(tiny_config("1,2,16")).save_pretrained(tmp_path / "model")
    tokenize = ["tokenize", str(data), "--tokenizer", str(tmp_path / "model"), "--out", str(tmp_path / "cache"),
                "--images.held-out", "0.2", "--device", "cpu"]  # fmt: skip
    assert main(tokenize) == 0
    assert "\nwrote" in f"\n{capsys.readouterr().out}"
    assert main(tokenize) == 0
    assert "nothing to write, complete already" in capsys.readouterr().out
    write_images(data, seed=1)  # other pixels under equal names and sizes
    touch(data)
    assert main(tokenize) == 2
    assert "other modification times, with equal names and sizes; choose another --out" in capsys.readouterr().err
    assert main([*tokenize, "--accept-changes"]) == 0
    assert main(tokenize) == 0, "what is accepted is recorded"
    (tmp_path / "cache" / INPUTS).unlink()  # a cache of an earlier version
    capsys.readouterr()
    assert main(tokenize) == 0
    assert "does not record all that it was made of" in capsys.readouterr().out


def test_a_run_is_refused_when_its_data_or_tokenizer_changed(tmp_path, capsys):
    from nextscale.common.distributed import World
    from nextscale.training.open_run import Run

    data = write_images(tmp_path / "pictures")
    run = Run(tmp_path / "run", {"train": {}}, World())
    weights = {"tokenizer": {"where": "runs/t", "weights": "1"}}
    run.record(describe(data) | weights, accept_changes=False)
    run.record(describe(data) | weights, accept_changes=False)
    (data / "cat" / "000.bmp").unlink()
    with pytest.raises(UserError, match=r"the files of .* have changed: 12 files.*--accept-changes"):
        run.record(describe(data) | weights, accept_changes=False)
    run.record(describe(data) | weights, accept_changes=True)
    weights["tokenizer"]["weights"] = "2"
    with pytest.raises(UserError, match=r"the weights of runs/t have changed"):
        run.record(describe(data) | weights, accept_changes=False)
    capsys.readouterr()


def test_samples_of_another_model_are_drawn_again_and_every_class_is_held_out(tmp_path, capsys):
    """They were kept by the model's name; and with ten classes all held-out samples were of the last one."""
    from nextscale.checkpoints.native import read_checkpoint
    from nextscale.common.distributed import World
    from nextscale.config.sparsify import SparsifyConfig
    from nextscale.sparsify.data import open_data

    def draw(seed):
        ten = ConditionConfig(num_classes=10)
        randomised(tiny_config(condition=ten), seed=seed).save_pretrained(tmp_path / "model")
        config = SparsifyConfig(samples=100, batch_size=50)
        return open_data(
            tmp_path / "model", read_checkpoint(tmp_path / "model"), config, tmp_path / "samples", World()
        )  # fmt: skip

    first = draw(0)
    assert sorted(first.held_out.tensors["label"].tolist()) == list(range(10))
    assert len(first.train) == 90
    assert torch.equal(draw(0).train.tensors["tokens"], first.train.tensors["tokens"])
    assert "made again" not in capsys.readouterr().out
    record = tmp_path / "samples" / "samples.json"
    before = json.loads(record.read_text())
    record.write_text(json.dumps({name: value for name, value in before.items() if name != "random numbers"}))
    draw(0)
    assert "made again: random numbers was a Mersenne Twister" in capsys.readouterr().out
    assert not torch.equal(draw(1).train.tensors["tokens"], first.train.tensors["tokens"])
    assert "samples of the model in" in capsys.readouterr().out


def test_experiments_refuse_data_that_changed_under_a_known_path(tmp_path):
    from nextscale.common.distributed import World
    from nextscale.research.experiments.ledger import check_experiment_inputs

    data, out = write_images(tmp_path / "pictures"), tmp_path / "out"
    other = write_images(tmp_path / "other", seed=1)
    check_experiment_inputs(out, [str(data), ""], ["train"], World())
    check_experiment_inputs(out, [str(data), str(other)], [], World())
    check_experiment_inputs(out, [str(data)], [], World())
    touch(other)
    check_experiment_inputs(out, [str(data)], [], World())
    with pytest.raises(UserError, match=r"trainings and figures of other inputs: the files of .*other have other mod"):
        check_experiment_inputs(out, [str(data), str(other)], [], World())
