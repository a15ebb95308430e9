"""Checkpoints as people save them: the same tensors are found, or the message names what was found."""

import argparse
import json
import pathlib
import re
import shutil
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nextscale.checkpoints.official import import_official
from nextscale.checkpoints.official_files import read_tensors
from nextscale.checkpoints.official_shapes import Hints
from nextscale.common.errors import UserError
from nextscale.encoders.load import load_encoder, load_feature_network
from tests.conftest import read_fixture

ANCHOR = "quantize.embedding.weight"
NET = {name: torch.full((2, 2), float(i)) for i, name in enumerate(
    (ANCHOR, "encoder.conv_in.weight", "encoder.mid.model.weight", "pos_start", "decoder.module.bias")
)}  # fmt: skip
EMA = {name: tensor + 100 for name, tensor in NET.items()}
BESIDE = {
    "epoch": 3, "args": argparse.Namespace(lr=1e-4, out=pathlib.Path("runs/x"), extra=types.SimpleNamespace(a=[1])),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "best": np.float64(0.5), "counts": defaultdict(int, a=np.int64(1)), "scheduler": {"last_epoch": 3},
}  # fmt: skip
few = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def read(tmp_path, data, *anchors, **options):
    torch.save(data, tmp_path / "x.pth")
    return read_tensors(tmp_path / "x.pth", *(anchors or (ANCHOR,)), **options)


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def fault(action, *arguments):
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


LAYOUTS = {
    "plain": NET,
    "ddp": prefixed(NET, "module."),
    "compiled": prefixed(NET, "_orig_mod."),
    "compiled ddp": prefixed(NET, "module._orig_mod.module."),
    "blocks compiled one by one": {name.replace("encoder.", "encoder._orig_mod."): t for name, t in NET.items()},
    "fsdp": {f"_fsdp_wrapped_module.{n.replace('mid.', 'mid._fsdp_wrapped_module.')}": t for n, t in NET.items()},
    "model": {"model": NET, **BESIDE},
    "state dict": {"state_dict": prefixed(NET, "module."), "arch": "x", **BESIDE},
    "model_state_dict": {"model_state_dict": OrderedDict(NET), **BESIDE},
    "trainer": {"trainer": {"vae_local": NET, "var_wo_ddp": {"word_embed.weight": torch.ones(1)}}, **BESIDE},
    "lightning": {
        "state_dict": prefixed(NET, "model.") | {"loss.lpips.weight": torch.ones(3)}, "epoch": 1, "loops": {},
        "optimizer_states": [BESIDE["optimizer"]], "pytorch-lightning_version": "2.5",
    },
    "another prefix": {"state_dict": prefixed(NET, "generator.net.") | {"disc.weight": torch.ones(3)}},
    "tensors beside other entries": {**NET, **BESIDE},
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in NET.items()},
    "some names wrapped": prefixed(NET, "module.") | {"encoder.other": torch.ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_is_found(tmp_path, layout):
    expected = NET | ({"encoder.other": torch.ones(1)} if layout == "some names wrapped" else {})
    found = read(tmp_path, LAYOUTS[layout])
    check_same({n: t for n, t in found.items() if n in expected}, expected)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert found.keys() == expected.keys() or layout == "tensors beside other entries"


@given(
    prefix=st.lists(st.sampled_from(["module", "_orig_mod", "model", "_forward_module"]), max_size=4),
    keys=st.lists(st.sampled_from(["model", "state_dict", "model_state_dict", "trainer", "module", "net"]), max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.float32]),
)
@few
def test_any_nesting_prefix_and_dtype(tmp_path, prefix, keys, dtype):
    expected = {name: tensor.to(dtype) for name, tensor in NET.items()}
    data = prefixed(expected, "".join(f"{part}." for part in prefix))
    for key in keys:
        data = {key: data, **BESIDE}
    check_same(read(tmp_path, data), expected)
    if not keys:
        save_file(data, tmp_path / "x.safetensors")
        check_same(read_tensors(tmp_path / "x.safetensors", ANCHOR), expected)


@pytest.mark.parametrize(
    "data",
    [
        {"model": NET, "ema": EMA},
        {"model": NET, "model_ema": prefixed(EMA, "module."), **BESIDE},
        {"ema": {"shadow": EMA, "decay": 0.99}, "state_dict": NET},
        {"state_dict": prefixed(NET, "model.") | prefixed(EMA, "ema_model.")},
        {"trainer": {"vae_wo_ddp": NET, "vae_ema": EMA}},
        {**NET, "ema": EMA},
    ],
)
def test_the_average_is_used_and_said(tmp_path, data, capsys):
    check_same(read(tmp_path, data), EMA)
    assert "their moving average" in capsys.readouterr().out


def test_what_the_average_lacks_is_taken_from_the_trained_weights(tmp_path, capsys):
    average = {name: tensor for name, tensor in EMA.items() if name != "pos_start"}
    check_same(read(tmp_path, {"model": NET, "ema": average}), {**EMA, "pos_start": NET["pos_start"]})
    assert "with 1 tensors that it lacks from the trained weights" in capsys.readouterr().out


def test_an_average_without_names_is_said(tmp_path, capsys):
    check_same(read(tmp_path, {"model": NET, "ema": {"shadow_params": [torch.ones(1)]}}), NET)
    assert "'ema' holds no such named tensors; those of 'model' are used" in capsys.readouterr().out
    flat = {name.replace(".", ""): tensor for name, tensor in EMA.items()}
    data = {"state_dict": prefixed(NET, "model.") | prefixed(flat, "model_ema."), "epoch": 7}
    torch.save(data, tmp_path / "flat.pth")
    check_same(read_tensors(tmp_path / "flat.pth", ANCHOR), NET)
    assert "model_ema' holds no such named tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"student": NET, "teacher": EMA}, "holds 2 networks that fit: 'student', 'teacher'; save the wanted one"),
        ({"a": NET, "ema": EMA, "ema2": EMA}, "holds 3 networks that fit: 'a', 'ema', 'ema2'"),
        ({**prefixed(NET, "module."), **NET}, "twice: as"),
        ({"model": {"quantize.embeding.weight": torch.ones(1), "x": torch.ones(1)}},
         f"no tensor named '{ANCHOR}' or PREFIX.{ANCHOR}; it has 2 others under 'model', such as 'quantize.embeding.w"),
        ({"epoch": 3, "model": "weights.pth"}, "holds no state dict .*; its keys are 'epoch', 'model'"),
        ({}, "it is empty"),
        ([NET], "it holds a list"),
        (torch.ones(3), "it holds a Tensor"),
        ({"\x1b[31m": {"\x1b[1mx": torch.ones(1)}}, "such as"),
    ],
)  # fmt: skip
def test_what_does_not_decide_is_refused(tmp_path, data, reason):
    message = fault(read, tmp_path, data)
    assert re.search(reason, message), message


class Config(dict):
    """A class of a program that is not installed here."""


def test_classes_that_could_run_code_are_named(tmp_path):
    message = fault(read, tmp_path, {"model": NET, "config": Config()})
    assert "it holds a tests.test_state_dicts.Config; save the state dict alone" in message
    message = fault(read, tmp_path, torch.nn.Linear(1, 1))
    assert "it holds a torch.nn.modules.linear.Linear" in message


def test_lightnings_settings_need_no_lightning(tmp_path):
    attributes = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"})
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    module.AttributeDict = attributes
    names = ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__)
    for name in names:
        sys.modules[name] = module
    try:
        torch.save({"state_dict": NET, "hyper_parameters": attributes(lr=1)}, tmp_path / "x.ckpt")
    finally:
        for name in names:
            del sys.modules[name]
    check_same(read_tensors(tmp_path / "x.ckpt", ANCHOR), NET)


def write_shards(folder, suffix, change=lambda index: None):
    """NET in two shards with their index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    parts = [dict(list(NET.items())[:2]), dict(list(NET.items())[2:])]
    places = {}
    for i, part in enumerate(parts, start=1):
        name = f"{stem}-{i:05d}-of-00002.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    change(index)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.{suffix}.index.json"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_with_an_index(tmp_path, suffix):
    index = write_shards(tmp_path, suffix)
    check_same(read_tensors(index, ANCHOR), NET)
    check_same(read_tensors(tmp_path, ANCHOR), NET)
    shard = sorted(tmp_path.glob("*-00001-*"))[0]
    assert f"is one of 2 shards; give {index.name} or the folder" in fault(read_tensors, shard, ANCHOR)
    shard.unlink()
    assert f"{shard} is missing" in fault(read_tensors, tmp_path, ANCHOR)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i: i["weight_map"].pop(ANCHOR), f"does not hold what .* lists: '{ANCHOR}' is in only one"),
        (lambda i: i["weight_map"].update(extra="model-00001-of-00002.safetensors"), "'extra' is in only one"),
        (
            lambda i: i["weight_map"].update(x="../secret.safetensors"),
            "names '../secret.safetensors', which is no file",
        ),
        (lambda i: i["weight_map"].update(x=3), "weight_map.x is 3; it must be of type str"),
        (lambda i: i.pop("weight_map"), "lacks 'weight_map'"),
        (lambda i: i.update(weight_map={}), "weight_map lists no tensors"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, change, reason):
    index = write_shards(tmp_path, "safetensors", change)
    message = fault(read_tensors, tmp_path, ANCHOR)
    assert str(index) in message
    assert re.search(reason, message), message


def test_folders(tmp_path, capsys):
    save_file(NET, tmp_path / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt", "README.md"):
        (tmp_path / name).write_bytes(b"")
    check_same(read_tensors(tmp_path, ANCHOR), NET)  # as accelerate writes it
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    check_same(read_tensors(tmp_path, ANCHOR), NET)
    assert "several formats; model.safetensors is used" in capsys.readouterr().out
    save_file(EMA, tmp_path / "model_1.safetensors")
    assert "3 files of weights (model.safetensors, model_1.safet" in fault(read_tensors, tmp_path, ANCHOR)
    (tmp_path / "empty").mkdir()
    assert "holds no file of weights (nothing)" in fault(read_tensors, tmp_path / "empty", ANCHOR)
    (tmp_path / "empty" / "config.json").write_text('{"format": "nextscale"}')
    assert "is a nextscale checkpoint already" in fault(read_tensors, tmp_path / "empty", ANCHOR)


def test_import_official_takes_what_people_save(tmp_path):
    """Both parts in one file of a trainer, and a transformer in half precision in a folder of accelerate."""
    vae, var = map(load_file, read_fixture("var_tiny_l2").files)
    plain = import_official(*read_fixture("var_tiny_l2").files, Hints())
    joint = {"trainer": {"vae_local": prefixed(vae, "module."), "var_wo_ddp": prefixed(var, "_orig_mod.")}, **BESIDE}
    torch.save(joint, tmp_path / "joint.pth")
    imported = import_official(tmp_path / "joint.pth", tmp_path / "joint.pth", Hints())
    assert imported.config == plain.config
    check_same(imported.tokenizer, plain.tokenizer)
    check_same(imported.transformer, plain.transformer)

    (tmp_path / "accelerate").mkdir()
    for dtype in (torch.float16, torch.float64):
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in var.items()}
        save_file(prefixed(cast, "module."), tmp_path / "accelerate" / "model.safetensors")
        imported = import_official(tmp_path / "joint.pth", tmp_path / "accelerate", Hints())
        check_same(imported.transformer, {name: tensor.to(dtype) for name, tensor in plain.transformer.items()})
    shutil.rmtree(tmp_path / "accelerate")
    with pytest.raises(UserError, match="there is no file"):
        import_official(tmp_path / "joint.pth", tmp_path / "accelerate", Hints())


def test_networks_of_features_say_what_they_look_for(tmp_path):
    torch.save({"model": NET}, tmp_path / "x.pth")
    for folder in (tmp_path / "x.pth", tmp_path):
        assert "no tensor named 'pos_embed'" in fault(load_encoder, str(folder))
        assert "no tensor named 'Conv2d_1a_3x3.conv.weight'" in fault(load_feature_network, str(folder))
