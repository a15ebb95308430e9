"""One test per mishap that a stranger met: each gives one line, a non-zero status, and loses nothing."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.parse import from_dict
from nextscale.config.quickstart import QuickstartConfig
from nextscale.data.datasets import load_images
from nextscale.pipeline import Pipeline
from nextscale.quickstart.run import run_quickstart
from nextscale.training.engine.checks import Interrupted
from nextscale.training.engine.loop import train
from tests.conftest import randomised, read_fixture, tiny_config
from tests.test_quickstart import picture, tiny_settings
from tests.test_train import SETTINGS, tasks

ROOT = Path(__file__).parents[1]


def complaint(capsys, *arguments: object) -> str:
    """What a failing command says: one line, and no trace of Python."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("nextscale: error: ")]
    assert len(errors) == 1, lines
    assert "unexpected" not in errors[0], errors[0]
    return errors[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_smooth_mode_of_a_wide_codebook_does_not_depend_on_the_batch(threads, threads_set):
    from dataclasses import replace

    threads_set(threads)
    config = tiny_config("1,2,3,4,5,6,8", width=256, heads=4, depth=2)
    config = replace(config, tokenizer=replace(config.tokenizer, vocab_size=512))
    pipeline = randomised(config).optimize()
    together = pipeline.sample([1, 2, 3, 4, 0], smooth=True, batch_size=5)
    alone = pipeline.sample([1, 2, 3, 4, 0], smooth=True, batch_size=1)
    assert torch.equal(together.tokens, alone.tokens)
    assert torch.equal(together.tensor, alone.tensor)


def test_a_partial_table_keeps_the_other_defaults():
    base = QuickstartConfig()
    data = {"train_tokenizer": {"steps": 5}, "transformer": {"depth": 2}, "sampling": {"seed": 4}}
    config = from_dict(QuickstartConfig, data, "c", base)
    assert (config.train_tokenizer.steps, config.train_tokenizer.batch_size) == (5, base.train_tokenizer.batch_size)
    assert (config.transformer.depth, config.transformer.width) == (2, base.transformer.width)
    assert (config.sampling.seed, config.sampling.cfg) == (4, base.sampling.cfg)


def test_a_failed_start_does_not_claim_the_folder(tmp_path):
    with pytest.raises(UserError, match="is neither"):
        run_quickstart(tiny_settings(data=str(tmp_path / "typo")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_output_paths_that_cannot_be(capsys, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    sample = ["sample", tiny_folder, "--labels", "1", "--out"]
    for out in (tmp_path / "file" / "g.png", "", ".", "/", tmp_path / ("x" * 300), tmp_path / "g.psd"):
        complaint(capsys, *sample, out)
    complaint(capsys, *sample, tmp_path / "g.png", "--tokens-out", tmp_path / "file" / "t.st")
    complaint(capsys, *sample, tmp_path / "g.png", "--images-out", tmp_path / "file")
    complaint(capsys, "export-official", tiny_folder, "--vae", tmp_path / "file" / "v.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_outputs_are_replaced_together_or_not_at_all(capsys, tiny_folder, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"old")
    (tmp_path / "file").write_text("mine")
    bad = tmp_path / "file" / "t.safetensors"
    complaint(capsys, "sample", tiny_folder, "--labels", "1", "--out", tmp_path / "grid.png", "--tokens-out", bad)
    (tmp_path / "v.pth").write_bytes(b"old")
    complaint(capsys, "export-official", tiny_folder, "--vae", tmp_path / "v.pth", "--var", bad)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "v.pth").read_bytes() == b"old"


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 4), (2, 2, 2, 2, 2, 2)])
def test_official_tensors_of_odd_shapes(shape, tmp_path, capsys):
    for which, name in enumerate(("quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight",
                                  "quantize.ema_vocab_hit_SV", "word_embed.weight", "class_emb.weight", "head.weight",
                                  "pos_1LC", "pos_start", "lvl_embed.weight", "lvl_1L",
                                  "blocks.0.ffn.fc1.weight")):  # fmt: skip
        files = [tmp_path / "vae.safetensors", tmp_path / "var.safetensors"]
        for source, target in zip(read_fixture("var_tiny_l2").files, files, strict=True):
            shutil.copy(source, target)
        tensors = load_file(files[which > 3])
        tensors[name] = torch.zeros(shape)
        save_file(tensors, files[which > 3])
        line = complaint(capsys, "import-official", "--vae", files[0], "--var", files[1], "--out", tmp_path / "m")
        assert name in line or "scale" in line
    assert not (tmp_path / "m").exists()


def test_official_pickles_of_odd_content(tmp_path, capsys):
    tensors = load_file(read_fixture("var_tiny_l2").files[0])
    for content in ({1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}, [1], {"a": 1}, torch.zeros(2)):
        torch.save(content, tmp_path / "x.pth")
        assert "holds no state dict" in complaint(
            capsys, "import-official", "--vae", tmp_path / "x.pth", "--out", tmp_path / "m"
        )
    tied = tensors["encoder.conv_in.bias"]
    tensors["decoder.conv_in.bias"] = tied  # two names, one storage: a valid file
    torch.save(tensors, tmp_path / "x.pth")
    arguments = ["import-official", "--vae", tmp_path / "x.pth", "--scales", "1,2,3,4", "--out", tmp_path / "m"]
    assert main([str(a) for a in arguments]) == 0
    assert load_file(tmp_path / "m" / "tokenizer.safetensors")["decoder.conv_in.bias"].equal(tied)


@pytest.fixture
def copy(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers(dtype, copy, capsys):
    tensors = load_file(copy / "transformer.safetensors")
    tensors["head.bias"] = tensors["head.bias"].to(dtype)
    save_file(tensors, copy / "transformer.safetensors")
    line = complaint(capsys, "sample", copy, "--labels", "1", "--out", copy / "g.png")
    assert "tensor 'head.bias' is torch." in line
    assert "must be floating-point" in line


@pytest.mark.parametrize("official_seeding", [False, True])
def test_weights_that_are_not_finite(official_seeding, copy, capsys):
    tensors = load_file(copy / "transformer.safetensors")
    tensors["head.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "transformer.safetensors")
    with pytest.raises(UserError if not official_seeding else (UserError, RuntimeError)):
        Pipeline.from_pretrained(copy).sample([1], top_k=0, top_p=0.0, official_seeding=official_seeding)


CONFIG_NONSENSE = [
    ("pyramid", [None, 5, 1.5, True, [], ["x"], {}]),
    ("tokenizer.channel_multipliers", [[], None, [0], [-1], 3]),
    ("tokenizer.norm_groups", [0, -1, None]),
    ("tokenizer.vocab_size", [-1, 0, 1e30, "x"]),
    ("tokenizer.code_width", [-1, 0]),
    ("tokenizer.quant_conv_kernel", [-1, 2]),
    ("tokenizer.num_phi", [-1, 1e30]),
    ("tokenizer.phi_ratio", [-1, float("inf"), float("nan")]),
    ("transformer.heads", [-1, None]),
    ("transformer.depth", [0, -1, 1e30, [1]]),
    ("transformer.ffn_ratio", [-1, 0, float("nan"), float("inf")]),
    ("transformer.norm_eps", [-1, float("nan")]),
    ("transformer.condition.num_classes", [0, -5, 1e30]),
    ("class_names", ["a", [1], ["a"]]),
]


@pytest.mark.parametrize(("key", "values"), CONFIG_NONSENSE, ids=[k for k, _ in CONFIG_NONSENSE])
def test_nonsense_in_config_json_names_the_file(key, values, copy, capsys):
    head = json.loads((copy / "config.json").read_text())
    for value in values:
        spoiled = json.loads(json.dumps(head))
        *tables, last = key.split(".")
        place = spoiled["model"]
        for table in tables:
            place = place[table]
        place[last] = value
        (copy / "config.json").write_text(json.dumps(spoiled))
        assert "config.json" in complaint(capsys, "sample", copy, "--labels", "1", "--out", copy / "g.png")


def test_versions_and_origin(copy, capsys):
    head = json.loads((copy / "config.json").read_text())
    for change in ({"version": 0}, {"version": -1}, {"version": "1"}, {"origin": 5}):
        (copy / "config.json").write_text(json.dumps(head | change))
        complaint(capsys, "sample", copy, "--labels", "1", "--out", copy / "g.png")
    head.pop("digest")  # an edit that the user accepts
    (copy / "config.json").write_text(json.dumps(head | {"origin": {"phi_layout": "x"}}))
    assert "phi_layout" in complaint(capsys, "export-official", copy, "--vae", copy / "v.pth")


def test_odd_values_on_the_command_line(tiny_folder, tmp_path, capsys):
    out = ["--out", tmp_path / "g.png"]
    for labels in ("²", "--5", "9" * 5000, "1.5"):
        complaint(capsys, "sample", tiny_folder, f"--labels={labels}", *out)
    for option, value in (("cfg", "inf"), ("cfg", "nan"), ("temperature", "1e-40"), ("device", "foo"),
                          ("device", "meta"), ("batch-size", "0"), ("top-p", "nan")):  # fmt: skip
        complaint(capsys, "sample", tiny_folder, "--labels", "1", f"--{option}", value, *out)
    for option, value in (("train-tokenizer.learning-rate", "nan"), ("tokenizer.vocab-size", "0"),
                          ("tokenizer.norm-groups", "0"), ("transformer.heads", "-1"), ("sampling.cfg", "inf"),
                          ("tokenizer.quant-conv-kernel", "2"), ("held-out", "0")):  # fmt: skip
        with pytest.raises(SystemExit, match="[12]"):  # nested settings: the parser frames the message
            sys.exit(main(["quickstart", f"--{option}", value, "--out", str(tmp_path / "run")]))
        printed = capsys.readouterr().err
        assert "must" in printed
        assert "unexpected" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become somebody without rights")
def test_no_permission(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m").chmod(0)
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from nextscale.cli.parser import main; import torch; "
        f"import nextscale.pipeline; os.setuid(65534); sys.exit(main(['sample', {str(tmp_path / 'm')!r}, '--labels', "
        f"'1', '--out', 'x.png']))"
    )
    os.chmod(tmp_path, 0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "nextscale: error" in done.stderr


def test_parquet_with_holes(tmp_path):
    import io

    import pyarrow as arrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    picture(0, np.random.default_rng(0)).save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue(), "path": None}] * 20 + [None]
    parquet.write_table(arrow.table({"image": rows, "label": [0] * 21}), tmp_path / "holes.parquet")
    data = load_images(str(tmp_path / "holes.parquet"), 8, 100, 0)
    assert (len(data), len(data.unreadable)) == (20, 1)
    assert "row 20" in data.unreadable[0]
    for labels in ([None] * 21, [[1]] * 21):
        parquet.write_table(arrow.table({"image": rows, "label": labels}), tmp_path / "holes.parquet")
        with pytest.raises(UserError, match="column 'label' must hold"):
            load_images(str(tmp_path / "holes.parquet"), 8, 100, 0)


def test_hidden_files_are_passed_over(tmp_path):
    for name in ("a", "z"):
        (tmp_path / name).mkdir()
        picture(0, np.random.default_rng(0)).save(tmp_path / name / "x.png")
        (tmp_path / name / "._x.png").write_bytes(b"macOS leaves these")
    data = load_images(str(tmp_path), 8, 10, 0)
    assert (data.class_names, data.labels_B.tolist(), data.unreadable) == (("a", "z"), [0, 1], ())


def test_a_folder_without_classes_is_one_class(tmp_path):
    for i in range(3):
        picture(0, np.random.default_rng(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    data = load_images(str(tmp_path), 8, 10, 0)
    assert (len(data), data.class_names, data.labels_B.tolist()) == (3, (tmp_path.name,), [0, 0, 0])
    (tmp_path / "cat").mkdir()
    picture(0, np.random.default_rng(9)).save(tmp_path / "cat" / "x.png")
    with pytest.raises(UserError, match=r"both class sub-folders \(cat, \.\.\.\) and 3 images outside them \(0.png\)"):
        load_images(str(tmp_path), 8, 10, 0)


def test_images_smaller_than_the_size_are_named_or_refused(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.new("RGB", (30, 6 if i == 0 else 30), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    data = load_images(str(tmp_path), 8, 10, 0)
    data.print_notes()
    assert len(data) == 4
    assert re.search(r"note: enlarged 1 images too small: .*0\.png \(30 x 6\)", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"4 of 4 images in .* are smaller than the model's 32 x 32, such as .*0\.png"):
        load_images(str(tmp_path), 32, 10, 0)


@pytest.mark.parametrize("content", [[1], {"module": 3, "step": 1, "settings": {}, "optimizer": {}}, 5])
def test_training_states_of_odd_content(content, tmp_path):
    import hashlib

    (tmp_path / "training").mkdir()
    path = tmp_path / "training" / "tokenizer-00000001.pt"
    torch.save(content, path)
    path.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    with pytest.warns(UserWarning, match="cannot be used"), pytest.raises(UserError, match="no sound training state"):
        train(tasks(randomised(tiny_config()))[0], SETTINGS, tmp_path)


def test_a_stop_in_the_last_step_is_heard(tmp_path):
    import signal

    task = tasks(randomised(tiny_config()))[0]
    normal = task.forward

    def stop_at_the_end(batch, noise, step):
        if step == SETTINGS.steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return normal(batch, noise, step)

    task.forward = stop_at_the_end
    with pytest.raises(Interrupted):
        train(task, SETTINGS, tmp_path)


def test_weight_files_are_readable_as_the_umask_says(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        tiny.save_pretrained(tmp_path / "m")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "m").iterdir()}
    assert modes == {0o644}


def test_class_names_come_before_indices():
    from dataclasses import replace

    pipeline = randomised(replace(tiny_config(), class_names=("5", "7", "ant", "bee", "cat")))
    assert pipeline.label_indices(["5", "7", "2", "cat", None, 3]) == [0, 1, 2, 4, None, 3]


def test_numpy_labels(tiny):
    expected = tiny.sample([3, 4]).tokens
    assert torch.equal(tiny.sample(np.array([3, 4])).tokens, expected)
    assert torch.equal(tiny.sample([np.int64(3), np.int32(4)]).tokens, expected)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    from nextscale.data.images import load_image

    assert np.array_equal(np.asarray(load_image(tmp_path / "x.png")), pixels)
