"""Commands that read data sets take any columns; experiments also models that are not square."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextscale.checkpoints.native import read_config
from nextscale.cli.commands import COMMANDS
from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.data import ReadConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.data.sources import open_source
from nextscale.encoders.classifier import Classifier
from nextscale.evaluation.run import evaluate
from nextscale.research.experiments.entry import load_experiment, replace_reading
from nextscale.research.experiments.run import resolve_inputs, run_experiment
from tests.conftest import randomised, tiny_config
from tests.test_parquet import class_label, images, write_table

NO_DATA_SET = {
    "card", "demo", "doctor", "sample", "edit", "resume", "adapt", "upcycle", "quantise", "bench", "info",
    "merge-lora",
    "import-official", "export-official", "analyse errors", "analyse convergence", "analyse dynamic", "experiment list",
    "experiment show",
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


# ---- evaluate and statistics: labels are used where there are any


def write_forms(folder, seed):
    """The same twelve images in every form, of which some have the columns `fine` and `second`, some others, some none.

    Those that have neither a column nor folders of classes have no labels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    labels = [i % 3 for i in range(12)]
    folder.mkdir()
    contents = []
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        contents.append({"bytes": buffer.getvalue(), "path": None})
        for name in (f"classes/{'abc'[label]}/{i}.png", f"flat/{i}.png", f"listed/{i}.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(buffer.getvalue())
    rows = "".join(f"{i}.png,{'abc'[label]}\n" for i, label in enumerate(labels))
    (folder / "listed" / "metadata.csv").write_text(f"file_name,fine\n{rows}")
    np.savez(folder / "plain.npz", pixels)
    black = [{"bytes": images(1)[0]["bytes"], "path": None}] * 12
    write_table(folder / "fine.parquet", image=contents, fine=labels)
    write_table(folder / "second.parquet", image=black, second=contents, label=labels, fine=labels)
    write_table(folder / "bare.parquet", image=contents)
    write_table(folder / "unknown.parquet", image=contents, label=[-1] * 12)
    for suffix in ("fine", "other", ""):
        with tarfile.open(folder / f"{suffix or 'bare'}.tar", "w") as archive:
            for i, content in enumerate(contents):
                parts = [(f"{i}.png", content["bytes"]), (f"{i}.{suffix}", str(labels[i]).encode())]
                for name, data in parts if suffix else parts[:1]:
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


FORMS = ["classes", "flat", "listed", "plain.npz", "fine.parquet", "second.parquet", "bare.parquet", "unknown.parquet",
         "fine.tar", "other.tar", "bare.tar"]  # fmt: skip
WITH_COLUMN = {
    "label_column": {"listed", "fine.parquet", "second.parquet", "fine.tar"},
    "image_column": {"second.parquet"},
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    Classifier(ClassifierConfig(8, (8,), 4), ("a", "b", "c")).save(folder / "classifier")
    for seed, name in enumerate(("set", "reference")):
        write_forms(folder / name, seed)
    return folder


def measure_pair(forms, first, second, out, **columns):
    config = EvaluationConfig(images=ReadConfig(**columns), references=5)
    network, reference = str(forms / "classifier"), str(forms / "reference" / second)
    report = evaluate(str(forms / "set" / first), out, [network], [reference], config, World())
    return report["measures"]["classifier"]


@pytest.mark.parametrize("columns", [{"label_column": "fine"}, {"image_column": "second"},
                                     {"label_column": "fine", "image_column": "second"}, {}])  # fmt: skip
def test_a_data_set_without_the_column_is_measured_where_another_one_has_it(forms, tmp_path, columns):
    """Each form as the set and as the reference. Without labels only the share that is read as asked is missing."""
    expected = measure_pair(forms, "classes", "classes", tmp_path / "r.json")
    assert expected["classifier_fd"] > 0
    pairs = [("classes", form) for form in FORMS]
    pairs += [(form, "second.parquet") for form in FORMS] if len(columns) == 2 else []
    pairs += [("plain.npz", "fine.tar"), ("fine.tar", "bare.tar"), ("other.tar", "listed"), ("listed", "plain.npz")]
    for number, (first, second) in enumerate(pairs):
        lacking = [option for option in columns if not {first, second} & WITH_COLUMN[option]]
        black = "second.parquet" in (first, second) and "image_column" not in columns
        if lacking:
            with pytest.raises(UserError, match="has no (column|table|images|labels)|no samples with labels"):
                measure_pair(forms, first, second, tmp_path / "x.json", **columns)
            continue
        found = measure_pair(forms, first, second, tmp_path / f"{number}.json", **columns)
        if not black:
            for metric in ("classifier_fd", "classifier_score", "classifier_precision", "classifier_recall"):
                assert found[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-7), (first, second, metric)
        if first in ("classes", "listed"):
            with_labels = first == "classes" or "label_column" in columns
            assert ("classifier_read_as_asked" in found) == with_labels, (first, second)


def test_a_column_that_no_data_set_has_is_refused_before_anything_is_measured(forms, tmp_path, capsys):
    command = ["evaluate", str(forms / "set" / "flat"), "--features", str(forms / "classifier"), "--out"]
    command += [str(tmp_path / "r.json"), "--reference", str(forms / "reference" / "fine.parquet")]
    assert main([*command, "--images.label-column", "fnie"]) == 2
    assert "flat has no table with a column 'fnie'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--images.label-column", "fine"]) == 0
    assert "no table with a column 'fine'; it is read as without --images.label-column" in capsys.readouterr().out


def test_statistics_and_pairs_need_no_labels(forms, tmp_path, capsys):
    tables = [str(forms / "set" / name) for name in ("bare.parquet", "fine.parquet", "flat")]
    made = []
    for number, options in enumerate(([], ["--images.label-column", "fine"], [])):
        out = tmp_path / f"{number}.npz"
        assert (
            main(["statistics", tables[number], "--features", str(forms / "classifier"), "--out", str(out), *options])
            == 0
        )
        made.append(np.load(out)["mu"])
    assert np.allclose(made[0], made[1])
    assert np.allclose(made[0], made[2])
    assert "bare.parquet has no column 'label'" in capsys.readouterr().out
    command = ["statistics", tables[0], "--features", str(forms / "classifier"), "--out", str(tmp_path / "x.npz")]
    assert main([*command, "--images.label-column", "fine"]) == 2


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
        entry, rows=(row,), seeds=(0,), images=6, classifier=shorten(entry.classifier), pictures=("samples",)
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
