"""What the page of `nextscale demo` shows, without gradio: it equals what the pipeline and the commands give."""

import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextscale.cli.parser import main, parse
from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.demo.growth import MOST_PICTURES, Request, format_flops, grow
from nextscale.demo.models import DEFAULTS, Models, Stopped
from nextscale.demo.recipe import name_labels, write_command, write_python
from nextscale.evaluation.flops import count_sampled_flops
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config

ROOT = Path(__file__).parents[1]
VARIED = SampleConfig(cfg=2.5, top_k=20, top_p=0.9, temperature=0.85, smooth=True, seed=2**31 - 2)


@pytest.fixture(scope="module")
def models(tiny_folder):
    models = Models([str(tiny_folder)])
    yield models
    models.close()


@pytest.fixture(scope="module")
def model(models):
    return models.load(models.sources[0])


def finish(models, model, request):
    *_, growth = models.iterate(grow(model, request))
    return growth


# ---- pictures scale by scale


@pytest.mark.parametrize("settings", [SampleConfig(), replace(VARIED, smooth=False)], ids=["default", "varied"])
def test_pictures_after_each_scale_are_those_of_the_tokens_so_far(models, model, settings):
    labels = (3, None, 0)
    growths = list(models.iterate(grow(model, Request(labels, settings))))
    images = model.pipeline.sample(list(labels), settings)
    assert [growth.done for growth in growths] == [False, False, False, True]
    assert growths[-1].captions == list(images.captions) == ["3", "no label", "0"]
    for k, canvas in enumerate(model.pipeline.tokenizer.build_canvases(images.tokens)):
        decoded = model.pipeline.tokenizer.decode_canvas(canvas)
        expected = ((decoded + 1) / 2 * 255).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.stack([np.asarray(p) for p in growths[-1].scales[k]]), expected), k
        assert growths[k].scales == growths[-1].scales[: k + 1]


def test_the_last_pictures_of_smooth_sampling_are_those_of_the_pipeline(models, model):
    growth = finish(models, model, Request((1, 2), VARIED))
    assert list(growth.pictures) == model.pipeline.sample([1, 2], VARIED).pil()


def test_flops_are_those_that_were_executed(models, model):
    for settings in (SampleConfig(), SampleConfig(cfg=0), SampleConfig(cfg_scales=2)):
        growth = finish(models, model, Request((1, 2), settings))
        assert growth.flops == count_sampled_flops(model.pipeline, [1, 2], settings).flops
        assert f"; {format_flops(growth.flops)} an image" in growth.describe()
        assert growth.seconds > 0


def test_requests_that_take_turns_do_not_mix(models, model):
    """As two visitors at once: each gets what it would get alone."""
    requests = [Request((0, 1, 2), SampleConfig(seed=1)), Request((4,), replace(VARIED, seed=2))]
    alone = [finish(models, model, request).scales for request in requests]
    turns = zip_longest(*(models.iterate(grow(model, request)) for request in requests))
    *_, together = turns
    assert [growth.scales for growth in together] == alone


def test_a_request_that_is_given_up_leaves_nothing(models, model):
    request = Request((0, 1), SampleConfig(seed=3))
    whole, steps = finish(models, model, request), models.iterate(grow(model, request))
    next(steps)
    steps.close()
    assert finish(models, model, request).scales == whole.scales


# ---- the same pictures elsewhere


@pytest.mark.parametrize(
    ("labels", "settings"),
    [((3,), SampleConfig(seed=7)), ((0, None, 4), VARIED), ((1,) * 20, SampleConfig(cfg=0.0, top_k=0, cfg_scales=0))],
    ids=["one", "varied", "more than a batch"],
)
def test_command_line_and_python_give_the_bytes_of_the_page(models, model, labels, settings, tmp_path, monkeypatch):
    """The page's file, the file of the Python lines, and the pixels of the command's files."""
    monkeypatch.chdir(tmp_path)
    request = Request(labels, settings)
    growth = finish(models, model, request)
    page = growth.write(tmp_path / "page.png")
    exec(write_python(model, request), {})
    assert (tmp_path / "grid.png").read_bytes() == page.read_bytes()
    (tmp_path / "grid.png").unlink()
    program, *arguments = shlex.split(write_command(model, request))
    assert program == "nextscale"
    assert main([*arguments, "--images-out", "pictures"]) == 0
    assert Image.open("grid.png").tobytes() == Image.open(page).tobytes()
    files = sorted(Path("pictures").glob("*.png"))
    assert [Image.open(file).tobytes() for file in files] == [p.tobytes() for p in growth.pictures]


def test_commands_name_the_type_that_computed(models, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = models.load(models.sources[0], "bfloat16")
    request = Request((2,), SampleConfig(seed=5))
    page = finish(models, half, request).write(tmp_path / "page.png")
    assert "--dtype bfloat16 --device cpu" in write_command(half, request)
    exec(write_python(half, request), {})
    assert (tmp_path / "grid.png").read_bytes() == page.read_bytes()


def test_classes_are_named_so_that_the_commands_read_them(tmp_path):
    """Names with commas, quotes and numbers, equal names, and a class that is called none."""
    names = ("tench, Tinca", "none", "3", 'say "a"', "crane", "crane", "Crane")
    config = tiny_config()
    condition = replace(config.transformer.condition, num_classes=len(names))
    config = replace(config, transformer=replace(config.transformer, condition=condition), class_names=names)
    folder = tmp_path / "a model's folder"
    randomised(config).save_pretrained(folder)
    models = Models([str(folder)])
    model, labels = models.load(str(folder)), (*range(len(names)), None)
    models.close()
    assert model.pipeline.label_indices(",".join(name_labels(model, labels))) == list(labels)
    command = parse(shlex.split(write_command(model, Request(labels, SampleConfig())))[1:])
    assert command.model == str(folder)
    assert config.parse_classes(command.labels) == list(labels)


# ---- models


def test_models_are_loaded_once_and_only_from_folders(models, model):
    assert models.load(models.sources[0]) is model
    assert models.load(f" {models.sources[0]} ") is model
    with pytest.raises(UserError, match="there is no folder 'owner/name': give the folder of a model"):
        models.load("owner/name")


def test_a_model_that_cannot_be_shown_is_refused(tiny, tmp_path):
    Pipeline(replace(tiny.config, transformer=None), tiny.tokenizer, None).save_pretrained(tmp_path / "tokenizer")
    models = Models([str(tmp_path / "tokenizer")])
    with pytest.raises(UserError, match="is a tokenizer alone, which cannot sample"):
        models.load(models.sources[0])
    models.close()


def test_without_a_model_those_of_the_repository_and_the_quickstart_are_offered(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert (
        "pip install" in error or "there is no model here (models/var-letters and models/var-cifar10 and runs" in error
    )
    with pytest.raises(UserError, match="`nextscale demo MODEL`, or train a small one in minutes"):
        Models()
    tiny.save_pretrained("runs/quickstart")
    for folder in (None, "models/var-cifar10", "models/var-letters"):
        if folder is not None:
            tiny.save_pretrained(folder)
        models = Models()
        assert models.sources == [name for name in DEFAULTS if Path(name).is_dir()]
        models.close()
    assert len(models.sources) == 3


def test_work_is_done_in_order_and_errors_reach_the_one_who_asked(tiny_folder):
    models, order = Models([str(tiny_folder)]), []
    folder = Path(models.folder)
    for number in range(5):
        models.run(lambda number=number: order.append(number))
    with pytest.raises(UserError, match="wrong"):
        models.run(lambda: (_ for _ in ()).throw(UserError("wrong")))
    assert order == [0, 1, 2, 3, 4]
    assert folder.is_dir()
    models.close()
    assert not folder.exists()


def test_what_is_stopped_ends_before_its_next_piece_and_others_go_on(models, model):
    clicked = threading.Event()
    one = models.until(clicked.is_set)
    request = Request((0, 1), SampleConfig(seed=3))
    steps, others = one.iterate(grow(model, request)), models.iterate(grow(model, request))
    assert [len(next(each).scales) for each in (steps, others, steps)] == [1, 1, 2]
    clicked.set()
    with pytest.raises(Stopped):
        next(steps)
    assert [len(growth.scales) for growth in others] == [2, 3, 4]


def test_work_that_waits_is_stopped_at_once_and_not_begun(models):
    clicked, done, begun = threading.Event(), threading.Event(), []
    with ThreadPoolExecutor() as visitors:
        busy = visitors.submit(models.run, done.wait)
        waiting = visitors.submit(models.until(clicked.is_set).run, lambda: begun.append(True))
        clicked.set()
        assert isinstance(waiting.exception(timeout=60), Stopped)
        assert not busy.done()
        done.set()
        assert busy.result()
    assert models.run(lambda: begun) == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [((), "choose at least one class"), ((0,) * (MOST_PICTURES + 1), f"at most {MOST_PICTURES} pictures at once")],
)
def test_requests_that_cannot_be_met_say_why(labels, message):
    with pytest.raises(UserError, match=message):
        Request(labels, SampleConfig())


@pytest.mark.parametrize(("flops", "text"), [(4.2e6, "4.2 MFLOP"), (1.05e9, "1.05 GFLOP"), (2.34e12, "2.34 TFLOP")])
def test_flops_are_written_with_units(flops, text):
    assert format_flops(flops) == text
