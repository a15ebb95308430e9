"""What a command writes never destroys what was there: each kind of output against each kind of content."""

import contextlib
import json
import os
import re
import shutil
import socket
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from nextscale.cli.commands import COMMANDS
from nextscale.cli.files import check_files
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically, write_json, write_text
from nextscale.common.outputs import PictureFile
from nextscale.common.pictures import write_image


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder below a folder, with its bytes."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def refuse(capsys, command: str) -> str:
    """The line of a command that is refused."""
    capsys.readouterr()
    assert main(command.split()) == 2, command
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "unexpected" not in line
    return line


def build_command(text: str) -> Any:
    """A command from its words, without the parser, which takes a tenth of a second."""
    words = text.split()
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    kind, words = COMMANDS[name], words[len(name.split()) :]
    hints = get_type_hints(kind)
    positional = [n for n, hint in get_type_hints(kind, include_extras=True).items() if "Positional" in str(hint)]
    values: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        option = word.removeprefix("--").replace("-", "_")
        if option in ("overwrite", "untrained"):
            values[option] = True
        elif not word.startswith("--"):
            values[positional.pop(0)] = word
        elif option in hints:
            values[option] = words.pop(0)
        else:
            nested[option] = words.pop(0)
    for option, value in values.items():
        several = str(hints[option]).startswith("tuple")
        convert = Path if "Path" in str(hints[option]) else str
        values[option] = value if value is True else (convert(value),) if several else convert(value)
    command = kind(**values)
    known = {n: v for n, v in nested.items() if n in ("data", "tokenizer", "start")}
    return replace(command, settings=replace(command.settings, **known)) if known else command


def check(text: str) -> None:
    """What the command line does before a command runs."""
    with check_files(build_command(text)):
        pass


@pytest.fixture
def place(stock, tmp_path, monkeypatch):
    """A folder with a thing of every kind that commands read or write, to change."""
    shutil.copytree(stock, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture(scope="module")
def stock(tiny_folder, tmp_path_factory):
    """The same, not to be changed."""
    folder = tmp_path_factory.mktemp("stock")
    with contextlib.chdir(folder):
        make_stock(tiny_folder)
    return folder


def write(path: str, content: str | dict) -> None:
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    Path(path).write_text(content if isinstance(content, str) else json.dumps(content))


def make_stock(tiny_folder: Path) -> None:
    """A thing of every kind, in the current folder."""
    shutil.copytree(tiny_folder, "model")
    shutil.copytree(tiny_folder, "other")
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", (12, 12), "teal").save(f"photos/{name}/0.jpg")
    Image.new("RGB", (12, 12), "navy").save("photo.jpg")
    Image.new("L", (12, 12), 255).save("mask.png")
    write_image(Image.new("RGB", (4, 4)), Path("grid.png"), "nextscale sample")
    Path("set.parquet").write_bytes(b"PAR1 rows PAR1")
    write_image(Image.new("RGB", (4, 4)), Path("curves.png"))
    np.savez("adm.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez("samples.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    np.savez("ours.npz", mu=np.zeros(2), sigma=np.eye(2), network="classifier", fingerprint="0")
    torch.save({"a": torch.zeros(2)}, "vae.pth")
    save_file({"a": torch.zeros(2)}, "vae.safetensors")
    save_file({"tokens": torch.zeros(2), "images": torch.zeros(2)}, "tokens.safetensors")
    write("package.json", {"name": "mine"})
    write("fid.json", {"source": "model", "protocol": {}, "measures": {}})
    write("run/run.json", {"validation_images": 5})
    write("tokenizer-run/run.json", {"codebook": {}, "losses": {}})
    write("encoder-run/run.json", {"moco": {}})
    write("quick/quickstart.json", {})
    write("cache/cache.json", {"format": "nextscale-tokens"})
    write("sparse/sparsify.json", {})
    write("fid.work/samples/features.json", {"networks": {}})
    write("analysis/load.json", {"analysis": "load"})
    write("diffusers/config.json", {"model_type": "unet"})
    write("c.yaml", "{}")
    write("errors/load.json", {"mine": 1})
    Image.new("RGB", (4, 4)).save("errors/errors.png")
    Path("empty").mkdir()
    write("noted/train.log", "nohup")
    write("noted/settings.yaml", "{}")
    Path("link").symlink_to("elsewhere")


EVALUATE = "evaluate {} --features model --out {}"
TRAIN = "train cifar10 --data {} --tokenizer model --out {}"
REFUSED = [
    # an output that is an input
    ("statistics set.parquet --features cls --out set.parquet", "--out set.parquet is also the input DATA"),
    ("reconstruct model photo.jpg --out photo.jpg", "is also the input IMAGES"),
    ("edit model photo.jpg --mask mask.png --out photo.jpg", "is also the input IMAGE"),
    ("edit model photo.jpg --mask mask.png --out mask.png --overwrite", "is also the input --mask"),
    ("edit model photo.jpg --mask mask.png --out ./photos/../photo.jpg", "is also the input IMAGE"),
    ("upcycle model --out model", "is also the input MODEL"),
    ("adapt model --classes 2 --out model --overwrite", "is also the input MODEL"),
    ("sparsify model --out model", "is also the input MODEL"),
    ("import-official --vae vae.pth --out vae.pth", "is also the input --vae"),
    ("sample model --labels 1 --config c.yaml --out c.yaml", "is also the input --config"),
    (TRAIN.format("photos", "photos"), "is also the input --data"),
    ("analyse load model --data cache --out cache", "is also the input --data"),
    # among the files of an input
    (TRAIN.format("photos", "photos/run"), "lies in photos"),
    ("quickstart --data photos --out photos/a/run", "lies in photos"),
    (EVALUATE.format("photos", "photos/r.json"), "lies in photos"),
    ("evaluate photos --features model --out r.json --images-out photos/new", "lies in photos"),
    ("tokenize photos --tokenizer model --out photos/cache", "lies in photos"),
    # two outputs of one name
    ("export-official model --vae v.pth --var v.pth", "--vae and --var are the same: v.pth"),
    ("export-official model --vae v.pth --var ./sub/../v.pth", "are the same"),
    ("sample model --labels 1 --out g --tokens-out g", "are the same"),
    ("sample model --labels 1 --out x --tokens-out x/t.safetensors", "a file is no folder"),
    ("sample model --labels 1 --out all/grid.png --images-out all", "would join the pictures of --images-out"),
    # files of another kind, also with --overwrite
    ("sample model --labels 1 --out set.parquet", "pictures cannot be written as .parquet"),
    ("sample model --labels 1 --out model/config.json", "pictures cannot be written as .json"),
    (EVALUATE.format("model", "model/config.json --overwrite"), "which holds a nextscale checkpoint"),
    (EVALUATE.format("model", "package.json --overwrite"), "is a JSON file; it is not replaced"),
    (EVALUATE.format("model", "grid.png --overwrite"), "has the suffix of another kind of file; use .json"),
    (EVALUATE.format("model", "fid.work"), "has the suffix of another kind"),
    ("statistics photos --features model --out samples.npz --overwrite", "is arrays (arr_0)"),
    ("statistics photos --features model --out stats.json", "must end in .npz"),
    ("sample model --labels 1 --out g.png --tokens-out vae.safetensors --overwrite", "is a safetensors file"),
    ("sample other --labels 1 --out g.png --tokens-out model/tokens.json", "use .safetensors"),
    ("export-official other --vae model/tokenizer.safetensors --overwrite", "which holds a nextscale checkpoint"),
    ("export-official model --vae model/tokenizer.safetensors --overwrite", "which holds a nextscale checkpoint"),
    ("export-official model --vae set.pth.parquet", "use .pth"),
    # files of the same kind that somebody else wrote
    ("sample model --labels 1 --out mask.png", "is a picture that nextscale did not write; give --overwrite"),
    ("reconstruct model photo.jpg --out curves.png", "is a picture of `nextscale`; give --overwrite"),
    ("statistics photos --features model --out adm.npz", "give --overwrite"),
    ("export-official model --vae vae.pth", "is a torch file; give --overwrite"),
    (EVALUATE.format("other", "fid.json"), "give --overwrite"),
    # folders of another kind
    ("upcycle model --out run --overwrite", "holds a run of `nextscale train`; it is not replaced"),
    ("upcycle model --out other", "holds a nextscale checkpoint; give --overwrite"),
    ("adapt model --classes 2 --out diffusers --overwrite", "holds a model of another library"),
    ("import-official --vae vae.pth --out photos", "holds other files (a, b)"),
    ("sparsify model --out other", "holds a nextscale checkpoint"),
    ("sparsify model --out run", "holds a run of `nextscale train`"),
    ("quickstart --out run", "holds a run of `nextscale train`; it is not replaced; choose another --out"),
    ("quickstart --out .", "holds "),
    ("tokenize photos --tokenizer model --out run", "holds a run of `nextscale train`"),
    (TRAIN.format("digits", "tokenizer-run"), "holds a run of `nextscale tokenizer train`"),
    (TRAIN.format("digits", "other"), "holds a nextscale checkpoint"),
    ("tokenizer train tokenizer-cifar10 --data digits --out encoder-run", "holds a run of `nextscale encoder train`"),
    ("encoder train encoder-cifar10 --data digits --untrained --out quick", "holds a run of `nextscale quickstart`"),
    ("classifier train classifier-cifar10 --data digits --out cache", "holds a token cache"),
    ("tokenizer evaluate model --data digits --out tokenizer-run", "holds a run of `nextscale tokenizer train`"),
    ("analyse dynamic model --out run", "holds a run of `nextscale train`"),
    ("analyse errors model --out errors", "errors/errors.png is a picture that nextscale did not write"),
    ("analyse load model --data digits --out errors", "is a JSON file; it is not replaced"),
    ("experiment run var-sizes --out run", "holds a run of `nextscale train`"),
    ("experiment run var-sizes --out photos/a", "holds pictures (0.jpg)"),
    ("sample model --labels 1 --out g.png --images-out photos/a", "holds 0.jpg, which nextscale did not write"),
    ("evaluate photos --features model --out set.json --images-out other", "holds a nextscale checkpoint"),
    # folders in which nothing else belongs
    ("sample model --labels 1 --out cache/g.png", "which holds a token cache"),
    ("sample model --labels 1 --out fid.work/samples/g.png", "which holds features of"),
    ("sample model --labels 1 --out g.png --tokens-out diffusers/model.safetensors", "a model of another library"),
    # what cannot be
    ("sample model --labels 1 --out photo.jpg/g.png", "photo.jpg is a file, not a folder"),
    ("upcycle model --out set.parquet", "it is a file, not a folder"),
    (TRAIN.format("digits", "set.parquet/run"), "is a file, not a folder"),
    ("sample model --labels 1 --out photos", "it is a folder"),
    ("sample model --labels 1 --out /dev/full", "it is a device or a pipe"),
    ("sample model --labels 1 --out /dev/null", "it is a device or a pipe"),
    ("sample model --labels 1 --out /dev/stdout", "it is a device or a pipe"),
    ("sample model --labels 1 --out /proc/self/g.png", "it is a device or a pipe"),
    ("upcycle model --out /dev/new", "it is a device or a pipe"),
]


@pytest.mark.parametrize(("command", "said"), REFUSED, ids=[command for command, _ in REFUSED])
def test_an_output_that_would_destroy_something_is_refused(command, said, stock, monkeypatch):
    monkeypatch.chdir(stock)
    before = sorted(stock.rglob("*"))
    with pytest.raises(UserError, match=re.escape(said)):
        check(command)
    assert sorted(stock.rglob("*")) == before


@pytest.mark.parametrize("number", [0, 6, 19, 33, 40, 54])
def test_the_command_line_refuses_it_in_one_line(number, place, capsys):
    command, said = REFUSED[number]
    before = read_tree(place)
    assert said in refuse(capsys, command)
    assert read_tree(place) == before


ALLOWED = [
    "sample model --labels 1 --out new/sub/g.png --tokens-out new/t.safetensors --images-out new/all",
    "sample model --labels 1 --out grid.png --tokens-out tokens.safetensors",
    "sample model --labels 1 --out model/grid.png",
    "sample model --labels 1 --out mask.png --overwrite",
    "sample model --labels 1 --out g.jpg",
    "sample model --labels 1 --out g",
    "reconstruct model photo.jpg --out grid.png",
    "reconstruct model photo.jpg --out curves.png --overwrite",
    "statistics photos --features model --out ours.npz",
    "statistics photos --features model --out adm.npz --overwrite",
    "export-official model --vae vae.pth --var vae.safetensors --overwrite",
    "evaluate model --features model --out fid.json",
    "evaluate other --features model --out fid.json --overwrite",
    "evaluate model --features model --out model/fid.json",
    "upcycle model --out other --overwrite",
    "upcycle model --out empty",
    "sparsify model --out sparse",
    "quickstart --out quick",
    "tokenize photos --tokenizer model --out cache",
    "train cifar10 --data cache --tokenizer model --out run",
    "train cifar10 --data cache --tokenizer model --out run/next",
    "tokenizer train tokenizer-cifar10 --data photos --out tokenizer-run",
    "encoder train encoder-cifar10 --data photos --out encoder-run",
    "analyse load model --data cache --out analysis",
    "analyse pyramid model photo.jpg --out analysis",
    "analyse routing model --data cache --out analysis",
    "train cifar10 --data digits --tokenizer model --out noted",
    "train cifar10 --data digits --tokenizer model --out link",
]


@pytest.mark.parametrize("command", ALLOWED)
def test_natural_commands_are_allowed_and_checks_change_nothing(command, stock, monkeypatch):
    monkeypatch.chdir(stock)
    before = sorted(stock.rglob("*"))
    check(command)
    assert sorted(stock.rglob("*")) == before


def test_every_command_with_an_output_option_declares_it():
    for name, kind in COMMANDS.items():
        options = {f.name for f in fields(kind)} & {"out", "vae", "images_out", "tokens_out"}
        assert not options or hasattr(kind, "list_files") or name == "resume", name


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_an_input_are_the_input(link, place, capsys):
    link(place / "photo.jpg", place / "link.jpg")
    assert "is also the input" in refuse(capsys, "reconstruct model photo.jpg --out link.jpg --overwrite")


def test_a_link_is_written_through(place):
    Path("real").mkdir()
    Path("link.png").symlink_to("real/g.png")
    assert main(["sample", "model", "--labels", "1", "--out", "link.png"]) == 0
    assert Path("link.png").is_symlink()
    assert Image.open("real/g.png").info["Software"] == "nextscale sample"


def test_pipes_and_sockets_stay(place, capsys):
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "socket"):
            assert "it is a device or a pipe" in refuse(capsys, f"sample model --labels 1 --out {name}")
            with pytest.raises(UserError, match="device or a pipe"):
                write_text(Path(name), "text")
        assert Path("pipe").is_fifo()
        assert Path("socket").is_socket()


def test_a_command_replaces_its_own_picture(place):
    for _ in range(2):
        assert main(["sample", "model", "--labels", "1", "--out", "own.png"]) == 0


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_a_picture_that_was_edited_is_not_the_command_s_own(suffix, tmp_path):
    output = PictureFile("--out", tmp_path / f"own.{suffix}")
    write_image(Image.new("RGB", (4, 4)), output.path, "nextscale sample")
    output.check(overwrite=False)
    Image.open(output.path).convert("L").save(output.path)
    with pytest.raises(UserError, match="give --overwrite"):
        output.check(overwrite=False)
    output.check(overwrite=True)


def test_a_command_that_fails_leaves_no_folder(place, capsys):
    before = read_tree(place)
    Path("bad.png").write_bytes(b"no picture")
    refuse(capsys, "reconstruct model bad.png --out new/deep/g.png --images-out new/all")
    refuse(capsys, "import-official --vae set.parquet --out made/here")
    refuse(capsys, "train cifar10 --data cache --tokenizer nowhere --out made/run")
    refuse(capsys, "evaluate nowhere --features model --out made/r.json")
    Path("bad.png").unlink()
    assert read_tree(place) == before


def test_folders_made_by_a_write_that_fails_are_removed(tmp_path):
    def stop_while_writing() -> None:
        with write_atomically(tmp_path / "a" / "b" / "c.txt") as (draft,):
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_while_writing()
    with pytest.raises(UserError, match="cannot write two files"), write_atomically(tmp_path / "x", tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_models_at_one_path_are_refused_in_python(tiny_folder, tmp_path):
    from nextscale.checkpoints.native import read_checkpoint
    from nextscale.checkpoints.official import export_official
    from nextscale.checkpoints.saving import write_checkpoint

    checkpoint = read_checkpoint(tiny_folder)
    with pytest.raises(UserError, match="same file"):
        export_official(checkpoint, tmp_path / "v.pth", tmp_path / "v.pth")
    write_json(tmp_path / "config.json", {"model_type": "unet"})
    with pytest.raises(UserError, match="a model of another library"):
        write_checkpoint(tmp_path, checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_bench_of_a_tokenizer_and_an_unknown_device(place, tmp_path, capsys):
    from nextscale.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained("model")
    Pipeline(replace(pipeline.config, transformer=None), pipeline.tokenizer, None).save_pretrained("tokenizer")
    assert "tokenizer is a tokenizer alone, which cannot sample" in refuse(capsys, "bench tokenizer")
    said = refuse(capsys, "bench model --device gpu")
    assert said.endswith(
        "device 'gpu' cannot be used here: there is no such device; use auto, cpu, cuda, cuda:1 or mps"
    )


# ---- a property: no command line changes what was there


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_pair_of_places_loses_anything(stock, monkeypatch, data):
    """Random commands with random inputs and outputs: each check passes only if no file that was there is written.

    The oracle is plain: the files that a command would write, less those of its own kind.
    """
    monkeypatch.chdir(stock)
    things = sorted(p.name for p in stock.iterdir() if p.name not in ("empty", "noted", "link"))
    own: dict[str, set[str]] = {"sample": {"grid.png"}, "upcycle": set(), "quickstart": {"quick"}, "train": {"run"}}
    own |= {"tokenize": {"cache"}, "sparsify": {"sparse"}, "statistics": {"ours.npz"}}
    name = data.draw(st.sampled_from(sorted(own)))
    source = data.draw(st.sampled_from(things))
    out = data.draw(st.sampled_from([*things, "new", f"{source}/new"]))
    words = {
        "sample": f"sample {source} --labels 1 --out {out}",
        "upcycle": f"upcycle {source} --out {out}",
        "quickstart": f"quickstart --data {source} --out {out}",
        "tokenize": f"tokenize {source} --tokenizer model --out {out}",
        "sparsify": f"sparsify {source} --out {out}",
        "train": f"train cifar10 --data {source} --tokenizer model --out {out}",
        "statistics": f"statistics {source} --features model --out {out}",
    }[name]
    before = sorted(stock.rglob("*"))
    try:
        check(words)
        passed = True
    except UserError:
        passed = False
    assert sorted(stock.rglob("*")) == before
    if out in things:
        assert not passed or (out in own[name] and out != source)
    elif out == f"{source}/new" and passed:
        assert Path(source).is_dir()
        assert name not in ("quickstart", "tokenize", "train") or source not in ("photos", "cache")
