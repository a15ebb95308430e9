"""Optional packages: a command that needs a missing one says so before it works, or does without it, with a note.

Each missing package is a real process in which it cannot be imported; the commands run in it one after the other.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.common.extras import list_data_needs, list_network_needs
from nextscale.common.outputs import PictureFile
from tests.conftest import randomised, tiny_config
from tests.test_data import write_folder

ROOT = Path(__file__).parents[1]
RUN = """
import contextlib, io, json, sys
from nextscale.cli.parser import main
for line in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(line.split())
    print(json.dumps([status, out.getvalue(), "torch" in sys.modules]))
"""

QUICKSTART, DATA = "pip install 'nextscale[quickstart]'", "pip install 'nextscale[data]'"
DEMO = "pip install 'nextscale[demo]'"
FEATURES, TRACK = "pip install 'nextscale[features]'", "pip install 'nextscale[track]'"
ANALYSED = "model --data photos --out analysis"
REFUSED = {
    "matplotlib": {
        "quickstart --data photos --out q": QUICKSTART,
        f"analyse load {ANALYSED}": QUICKSTART,
        "analyse pyramid model photos --out analysis": QUICKSTART,
        f"analyse routing {ANALYSED}": QUICKSTART,
        f"analyse features {ANALYSED}": QUICKSTART,
        f"analyse attention {ANALYSED}": QUICKSTART,
        "analyse errors model --out analysis": QUICKSTART,
        "analyse dynamic model --out analysis": QUICKSTART,
        "analyse convergence run --out analysis": QUICKSTART,
        "experiment run var-filters --model model --data photos --out e": QUICKSTART,
    },
    "gradio": {"demo model": DEMO},
    "sklearn": {
        "quickstart --data photos --out q": QUICKSTART,
        "tokenize digits --tokenizer model --out cache": QUICKSTART,
        "evaluate model --features classifier --reference digits --out r.json": QUICKSTART,
        "encoder train encoder-digits --data digits --out encoder": QUICKSTART,
        f"analyse features {ANALYSED} --projection tsne": QUICKSTART,
        "experiment run var-filters --out e": QUICKSTART,
    },
    "pyarrow": {
        "evaluate model --features classifier --reference table.parquet --out r.json": DATA,
        "statistics owner/name --features classifier --out s.npz": DATA,
        "tokenize tables --tokenizer model --out cache": DATA,
        "tokenizer train tokenizer-cifar10 --data table.parquet --out t": DATA,
    },
    "transformers": {
        "evaluate model --features facebook/dinov2-base --reference photos --out r.json": FEATURES,
        "tokenize photos --tokenizer model --out cache --encoder dino": FEATURES,
        "train c.json --data photos --tokenizer model --out run --loss.encoder dino --device cpu": FEATURES,
        "encoder evaluate dino --data photos --test photos": FEATURES,
    },
    "tensorboard": {
        "train c.json --data photos --tokenizer model --out run --train.loggers tensorboard --device cpu": TRACK,
        "classifier train classifier-cifar10 --data photos --out c --train.loggers tensorboard --device cpu": TRACK,
        "sparsify model --data photos --out s --routers.loggers tensorboard --device cpu": TRACK,
        "quickstart --data photos --out q --train-transformer.loggers tensorboard": TRACK,
    },
}
CONFIG = {
    "transformer": {"depth": 1, "width": 16, "heads": 2},
    "images": {"held_out": 0.25},
    "train": {"steps": 2, "batch_size": 2, "save_every": 2, "log_every": 1, "warmup_steps": 0},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, pictures, a config, and what only looks like tables and DINO."""
    place = tmp_path_factory.mktemp("extras")
    write_folder(place / "photos")
    randomised(tiny_config()).save_pretrained(place / "model")
    (place / "c.json").write_text(json.dumps(CONFIG))
    (place / "tables" / "data").mkdir(parents=True)
    for name in ("table.parquet", "tables/data/train.parquet"):
        (place / name).write_bytes(b"PAR1")
    (place / "dino").mkdir()
    (place / "dino" / "config.json").write_text('{"model_type": "dinov2"}')
    return place


def run_without(package: str, place: Path, lines: list[str]) -> list[tuple[int, str, bool]]:
    """(exit status, what was printed, whether torch was loaded) of commands where a package cannot be imported."""
    hidden = place / "hidden" / package
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')")
    done = subprocess.run(
        [sys.executable, "-c", RUN, *lines],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(hidden), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("package", REFUSED)
def test_a_missing_package_is_named_before_any_work(package, place):
    before = sorted(place.iterdir())
    commands = REFUSED[package]
    for line, (status, printed, _) in zip(commands, run_without(package, place, list(commands)), strict=True):
        assert (status, printed.count("\n")) == (2, 1), f"{line}: {printed}"
        assert commands[line] in printed, f"{line}: {printed}"
    assert {p.name for p in place.iterdir()} - {p.name for p in before} <= {"hidden"}


def test_curves_are_left_out_without_matplotlib(place):
    (place / "c2.json").write_text(json.dumps({name: CONFIG[name] for name in ("images", "train")}))
    lines = [
        "train c.json --data photos --tokenizer model --out plain --device cpu",
        "classifier train c2.json --data photos --out plain-classifier --classifier.image-size 8 --device cpu",
        "sparsify plain --data photos --out sparse --tune none --expert-size 16 --scales 1 --routers.epochs 0 "
        "--routers.steps 1 --calibration-images 4 --device cpu",
    ]
    pictures = "plain/curves.png", "plain-classifier/curves.png", "sparse/sparsify.png"
    results = run_without("matplotlib", place, lines)
    for picture, (status, printed, _) in zip(pictures, results, strict=True):
        assert status == 0, printed
        assert f"note: {picture} will not be drawn" in printed, printed
        assert QUICKSTART in printed
        assert not (place / picture).exists()
        assert (place / picture).parent.is_dir()
    assert "see plain/samples.png; draw" in results[0][1]


def test_what_an_input_needs_is_read_from_its_name(tmp_path):
    (tmp_path / "classes").mkdir()
    assert list_data_needs("digits").keys() == {"sklearn"}
    assert list_data_needs("owner/name").keys() == {"pyarrow"}
    assert list_data_needs(tmp_path) == list_data_needs("statistics.npz") == list_data_needs("photos.tar") == {}
    assert list_network_needs("facebook/dinov2-base").keys() == {"transformers"}
    assert list_network_needs("models/inception.pth") == list_network_needs(ROOT / "models" / "encoder-cifar10") == {}


def test_a_picture_format_without_its_codec_is_refused(monkeypatch):
    """PIL lists formats whose codec it was built without; the first picture would fail after sampling."""

    def fail(*arguments):
        raise OSError("encoder jpeg not available")

    monkeypatch.setitem(Image.SAVE, "JPEG", fail)
    PictureFile("--out", Path("a.png")).check_name()
    with pytest.raises(UserError, match=re.escape("--out a.jpg: pictures cannot be written as .jpg; use .png")):
        PictureFile("--out", Path("a.jpg")).check_name()
