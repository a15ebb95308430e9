"""Profiles: applied they are the options typed by hand; with other weights, damaged or unknown they are refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextscale.cli.parser import main, parse
from nextscale.common.digest import add_digest
from nextscale.common.errors import UserError
from nextscale.common.machine import describe_machine
from nextscale.config.profile import Measured, list_profiles, make_profile, read_profile, write_profile
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config

TUNED = SampleConfig(cfg=(0.0, 1.5, 0.0), prune=(0.5,), prune_first_block=0, top_k=0, top_p=0.9, seed=7)
TYPED = [
    "--cfg", "0", "1.5", "0", "--prune", "0.5", "--prune-first-block", "0", "--top-k", "0", "--top-p", "0.9",
    "--dtype", "bfloat16",
]  # fmt: skip
HERE = describe_machine(torch.device("cpu"))
MEASURED = Measured(2.5, 0.01, 8, "classifier_fd", -0.02, 0.004, 5000, HERE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    randomised(tiny_config("1,2,4")).save_pretrained(folder / "model")
    randomised(tiny_config("1,2,4", depth=1)).save_pretrained(folder / "small")
    write_profile(folder / "model", "fast", make_profile(folder / "model", "bfloat16", TUNED, MEASURED))
    return folder


@pytest.fixture
def place(made, tmp_path):
    return shutil.copytree(made, tmp_path / "place")


def sample(place, name, *more):
    """The tensors and the metadata that `nextscale sample` writes."""
    out = place / f"{name}.safetensors"
    words = ["sample", place / "model", "--labels", "0,3", "--out", place / "grid.png", "--tokens-out", out, *more]
    assert main([str(word) for word in words]) == 0
    return out.read_bytes()


def test_a_profile_gives_the_images_of_the_options_typed_by_hand(place):
    by_name = sample(place, "a", "--profile", "fast")
    assert by_name == sample(place, "b", *TYPED), "the same bytes, the types in the metadata included"
    assert by_name != sample(place, "c")
    seeded = sample(place, "d", "--profile", "fast", "--seed", "3")
    assert seeded == sample(place, "e", *TYPED, "--seed", "3")
    pipeline = Pipeline.from_pretrained(place / "model", profile="fast")
    assert pipeline.dtype == torch.bfloat16
    stored = load_file(place / "a.safetensors")
    assert torch.equal(pipeline.sample([0, 3]).tensor, stored["images"])
    stored = load_file(place / "d.safetensors")
    assert torch.equal(pipeline.sample([0, 3], seed=3).tensor, stored["images"])


def test_options_win_over_a_config_file_and_that_over_a_profile(place):
    (place / "c.yaml").write_text("top_p: 0.8\ncfg: 1.0\n")
    words = f"sample {place}/model --labels 0 --out x.png --profile fast".split()
    assert parse(words).settings == replace(TUNED, seed=0)
    layered = parse([*words, "--config", str(place / "c.yaml"), "--cfg", "3", "--dtype", "float32"])
    assert layered.settings == replace(TUNED, seed=0, top_p=0.8, cfg=3.0)
    assert (parse(words).dtype, layered.dtype) == ("bfloat16", "float32")
    assert parse([*words, "--dtype", "auto"]).dtype == "auto"
    pipeline = Pipeline.from_pretrained(place / "model", profile="fast", dtype="float32")
    assert pipeline.dtype == torch.float32
    given = pipeline.sample([0], SampleConfig(top_k=1))
    assert torch.equal(given.tensor, Pipeline.from_pretrained(place / "model").sample([0], top_k=1).tensor)


def test_other_commands_take_profiles(place, capsys):
    for words in ("edit MODEL a.png --mask b.png --out c.png", "evaluate MODEL --out r.json"):
        command = parse([*words.replace("MODEL", str(place / "model")).split(), "--profile", "fast"])
        assert (command.settings, command.dtype) == (replace(TUNED, seed=0), "bfloat16")
    bench = parse(["bench", str(place / "model"), "--profile", "fast"])
    assert (bench.settings, bench.dtypes) == (replace(TUNED, seed=0), ("bfloat16",))
    Image.new("RGB", (4, 4), "teal").save(place / "a.png")
    Image.new("L", (4, 4), 0).save(place / "mask.png")
    words = f"edit {place}/model {place}/a.png --mask {place}/mask.png --label 2 --profile fast"
    assert main([*words.split(), "--out", str(place / "e.png")]) == 0


def test_info_lists_profiles(place, capsys):
    assert main(["info", str(place / "model")]) == 0
    expected = "profile fast: 2.50 times as fast as dense float32 at batch 8, classifier_fd -2.0% (at most +0.4%)"
    assert expected in capsys.readouterr().out
    assert main(["info", str(place / "model"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["profiles"]) == ["fast"]
    assert main(["info", str(place / "model"), "--verify"]) == 0
    assert "fast.json: matches its digest" in capsys.readouterr().out
    change(place, lambda table: table.update(dtype="float32"), digest=False)
    assert main(["info", str(place / "model")]) == 0
    assert "profile fast: cannot be used: " in capsys.readouterr().out


def change(place, edit, digest=True):
    """Edit the profile's file, with a new digest or the old one."""
    path = place / "model" / "profiles" / "fast.json"
    table = json.loads(path.read_text())
    edit(table)
    old = table.pop("digest")
    path.write_text(json.dumps(add_digest(table) if digest else table | {"digest": old}))


EDITS = {
    "fast.json does not match the digest that was written with it": (lambda t: t.update(dtype="float32"), False),
    "has no setting 'dtyp'; did you mean 'dtype'?": (lambda t: t.update(dtyp=t.pop("dtype")), True),
    "sampling has no setting 'cgf'; did you mean 'cfg'?": (lambda t: t["sampling"].update(cgf=1.0), True),
    "sampling: top_p must lie in 0 (off) to 1; got top_p=2": (lambda t: t["sampling"].update(top_p=2), True),
    "it must be one of 'auto', 'float32'": (lambda t: t.update(dtype="float8"), True),
    "lacks 'measured'": (lambda t: t.pop("measured"), True),
    "measured: batch must be 1 or more": (lambda t: t["measured"].update(batch=0), True),
}


@pytest.mark.parametrize("message", EDITS)
def test_a_profile_that_is_not_sound_is_refused(place, message, capsys):
    edit, digest = EDITS[message]
    change(place, edit, digest)
    assert main(f"sample {place}/model --labels 0 --out {place}/x.png --profile fast".split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "fast.json" in error
    with pytest.raises(UserError, match=re.escape(message)):
        Pipeline.from_pretrained(place / "model", profile="fast")


def test_a_profile_of_other_weights_is_refused(place, capsys):
    words = f"sample {place}/model --labels 0 --out {place}/x.png --profile fast".split()
    randomised(tiny_config("1,2,4"), seed=1).save_pretrained(place / "model")
    assert main(words) == 2
    assert "was found for other weights: the content of" in capsys.readouterr().err
    assert not (place / "x.png").exists()
    shutil.move(place / "model", place / "moved")
    randomised(tiny_config("1,2,4")).save_pretrained(place / "moved")
    assert read_profile(place / "moved", "fast").dtype == "bfloat16", "equal weights in another place"


def test_a_profile_knows_its_refiner(place, capsys):
    settings = SampleConfig(refiner=str(place / "small"), draft_scales=2)
    write_profile(place / "model", "two", make_profile(place / "model", "float32", settings, MEASURED))
    assert list_profiles(place / "model") == ["fast", "two"]
    pipeline = Pipeline.from_pretrained(place / "model", profile="two")
    by_hand = Pipeline.from_pretrained(place / "model").sample([0], settings)
    assert torch.equal(pipeline.sample([0]).tensor, by_hand.tensor)
    randomised(tiny_config("1,2,4", depth=1), seed=1).save_pretrained(place / "small")
    with pytest.raises(UserError, match=r"two.json was found for other weights: the content of .*small has changed"):
        read_profile(place / "model", "two")


def test_unknown_names_are_refused_with_what_there_is(place, capsys):
    words = f"sample {place}/model --labels 0 --out {place}/x.png --profile".split()
    assert main([*words, "fsat"]) == 2
    assert "has no profile 'fsat'; did you mean 'fast'?" in capsys.readouterr().err
    assert main([*words, "../model"]) == 2
    assert "'../model' is no name for a profile" in capsys.readouterr().err
    assert main(f"sample {place}/small --labels 0 --out {place}/x.png --profile fast".split()) == 2
    assert "has no profile 'fast'; it has none, `nextscale tune` makes one" in capsys.readouterr().err


def test_a_profile_of_another_machine_is_noted(place, capsys):
    measured = replace(MEASURED, machine=HERE | {"device": "another CPU"})
    write_profile(place / "model", "fast", make_profile(place / "model", "float32", TUNED, measured))
    sample(place, "a", "--profile", "fast")
    assert "note: profile fast was found on another machine (another CPU)" in capsys.readouterr().out
