"""Commands that read data sets take any columns; experiments also models that are not square."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextscale.checkpoints.native import read_config
from nextscale.cli.commands import COMMANDS
from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.data import ReadConfig
from nextscale.data.sources import open_source
from nextscale.research.experiments.entry import load_experiment, replace_reading
from nextscale.research.experiments.run import resolve_inputs, run_experiment
from tests.conftest import randomised, tiny_config
from tests.test_parquet import class_label, images, write_table

NO_DATA_SET = {
    "doctor", "sample", "edit", "resume", "adapt", "upcycle", "bench", "info", "import-official", "export-official",
    "analyse errors", "analyse convergence", "analyse dynamic", "experiment list", "experiment show",
}  # fmt: skip
"""Commands that read no data set, or in the case of `resume` with the columns that the run has recorded."""
FINE = ReadConfig(label_column="fine_label")


def write_cifar100(path, count=12):
    """A table in the layout of CIFAR-100."""
    features = {"fine_label": class_label("apple", "bear", "crab"), "coarse_label": class_label("fish", "fruit")}
    rows = range(count)
    pictures = []
    for i in rows:
        buffer = io.BytesIO()
        Image.new("RGB", (24, 18), (20 * i, 99, 9)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    write_table(path, features, img=pictures, fine_label=[i % 3 for i in rows], coarse_label=[i % 2 for i in rows])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in NO_DATA_SET])
def test_every_command_that_reads_a_data_set_has_the_options_of_columns(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help-all"])
    text = capsys.readouterr().out
    assert "--images.label-column" in text
    assert "--images.image-column" in text


# ---- reconstruct: labels are not needed


def reconstruct(folder, data, *options):
    """The images that `nextscale reconstruct` wrote for a data set."""
    options = ["--out", folder / "x.png", "--tokens-out", folder / "x.safetensors", "--overwrite", *options]
    assert main([str(a) for a in ("reconstruct", folder.parent / "model", data, *options)]) == 0
    return load_file(folder / "x.safetensors")["images"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    randomised(tiny_config()).save_pretrained(folder / "model")
    return folder


def test_reconstruct_reads_tables_without_labels(model, tmp_path, capsys):
    out, first, second = model / "out", images(4), images(4, 90)
    out.mkdir()
    write_table(tmp_path / "plain.parquet", image=first, label=[0, 1, 0, 1])
    expected = reconstruct(out, tmp_path / "plain.parquet")
    write_table(tmp_path / "cifar.parquet", img=first, fine_label=[0, 1, 2, 0], coarse_label=[1, 1, 0, 0])
    assert torch.equal(reconstruct(out, tmp_path / "cifar.parquet"), expected)
    write_table(tmp_path / "bare.parquet", image=first)
    assert torch.equal(reconstruct(out, tmp_path / "bare.parquet"), expected)
    write_table(tmp_path / "test.parquet", image=first, label=[-1, 0, -1, None])
    assert torch.equal(reconstruct(out, tmp_path / "test.parquet"), expected), "rows without a label are images too"
    write_table(tmp_path / "two.parquet", one=second, two=first, label=[0, 1, 0, 1])
    assert torch.equal(reconstruct(out, tmp_path / "two.parquet", "--images.image-column", "two"), expected)
    capsys.readouterr()
    for option, name in (("--images.image-column", "three"), ("--images.label-column", "fine")):
        assert main(["reconstruct", str(model / "model"), str(tmp_path / "cifar.parquet"), option, name,
                     "--out", str(tmp_path / "x.png")]) == 2  # fmt: skip
        assert f"no column '{name}'" in capsys.readouterr().err


def test_images_outside_of_classes_are_images(tmp_path):
    for name in ("b/2.png", "a/1.png", "c.png", "train/x/3.png", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(UserError):
        open_source(str(tmp_path), 8)
    source = open_source(str(tmp_path), 8, labelled=False)
    names = [source.read(i)[0].removeprefix(f"{tmp_path}/") for i in range(len(source.labels))]
    assert names == ["a/1.png", "b/2.png", "c.png", "train/x/3.png"]
    assert (set(source.labels), source.splits) == ({0}, {})


def test_archives_without_labels(tmp_path):
    import tarfile

    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")

    def list_names(*members, **reading):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in members:
                content = picture.getvalue() if name.endswith("png") else b"1"
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        source = open_source(str(tmp_path / "x.tar"), 8, ReadConfig(**reading), labelled=False)
        return [source.read(i)[0].split(": ")[1] for i in range(len(source.labels))]

    assert list_names("b.png", "cat/a.png", "._b.png", "notes.txt") == ["b.png", "cat/a.png"]
    samples = "b.png", "b.mask.png", "b.cls", "a.png", "a.mask.png"
    assert list_names(*samples, image_column="png") == ["b.png", "a.png"]
    with pytest.raises(UserError, match="has several images .*choose one with --images.image-column"):
        list_names(*samples)
    with pytest.raises(UserError, match="has no images"):
        list_names("notes.txt")


# ---- experiments


@pytest.mark.parametrize("name", ["tokenizer", "mepa-results", "dmoe-tuning", "var-accelerations"])
def test_columns_reach_every_part_of_an_experiment(name):
    before = load_experiment(name, "tiny")
    assert replace_reading(before, ReadConfig()) == before
    experiment = replace_reading(before, ReadConfig(label_column="a", image_column="b"))
    parts = [experiment.classifier, experiment.encoder, experiment.refiner]
    parts += [part for row in experiment.rows for part in (row.run, row.tokenizer, row.sparsify)]
    for part in filter(None, parts):
        assert (part.images.label_column, part.images.image_column) == ("a", "b")
    assert experiment.rows[0].run.images.limit == before.rows[0].run.images.limit


def test_an_experiment_on_a_table_with_other_columns_and_a_model_that_is_not_square(tmp_path, monkeypatch):
    """Classifier, token cache, generator, statistics, samples and pictures, of images of 6 x 12 pixels."""
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path / "x.parquet")
    randomised(tiny_config("1,1x2,2x3,3x6")).save_pretrained(tmp_path / "wide")
    entry = replace_reading(load_experiment("var-guidance", "tiny"), FINE)

    def shorten(config):
        train = replace(config.train, steps=2, batch_size=4, save_every=2)
        return replace(config, images=replace(config.images, held_out=0.3), train=train)

    row = replace(entry.rows[0], run=shorten(entry.rows[0].run))
    experiment = replace(
        entry, rows=(row,), seeds=(0,), images=6, classifier=shorten(entry.classifier), picture="samples"
    )
    inputs = resolve_inputs(experiment, {"data": "x.parquet", "reference": "x.parquet", "tokenizer": "wide"})
    results = run_experiment(experiment, inputs, tmp_path / "out", World())
    assert results["inputs"]["images.label-column"] == "fine_label"
    assert results["rows"][0]["figures"]["distance"]["mean"] > 0
    (run,) = (tmp_path / "out" / "tiny").glob("run-*")
    assert read_config(run)[0].class_names == ("apple", "bear", "crab")
    assert Image.open(tmp_path / "out" / "tiny" / "var-guidance" / "samples.png").width > 8 * 12
    table = (tmp_path / "out" / "tiny" / "var-guidance" / "table.md").read_text()
    assert "--reference x.parquet --images.label-column fine_label`" in table
