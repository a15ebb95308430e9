"""The page of `nextscale demo` in a real browser: it shows what the pipeline gives, and asks no other machine.

Needs gradio, playwright and Debian's chromium; nothing is downloaded.
"""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from nextscale.config.condition import ConditionConfig
from nextscale.config.sampling import SampleConfig
from nextscale.demo import editing
from nextscale.demo.growth import Request, grow
from nextscale.demo.recipe import write_command
from tests.browser import Visitor, explain_missing, open_browser, serve_models
from tests.conftest import randomised, tiny_config
from tests.screenshots import draw

if explain_missing():
    pytest.skip(f"the page is not tested in a browser: {explain_missing()}", allow_module_level=True)

SETTINGS = SampleConfig(top_k=32)
"""Those of the page at the start: the model has 32 codes."""
ROOT = Path(__file__).parents[1]
INTERRUPTIBLE = """
import signal, sys
from nextscale.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""
"""The command, also where those who started the tests ignore Ctrl-C, as a shell does in the background."""
_reached: list[str] = []


def _note_address(event, arguments):
    if event == "socket.getaddrinfo":
        _reached.append(str(arguments[0]))
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        _reached.append(str(arguments[1][0]))


@pytest.fixture(scope="module")
def served(tiny_folder):
    """The models, their page's address, and a browser."""
    sys.addaudithook(_note_address)
    with serve_models(str(tiny_folder)) as (models, address), open_browser() as browser:
        yield models, address, browser


@pytest.fixture(scope="module")
def opened(served):
    """A browser tab with the page, which all tests use: to open it is most of their work."""
    _, address, browser = served
    visitor = Visitor(browser, address)
    yield visitor
    visitor.close()


@pytest.fixture
def visitor(opened):
    """That tab, with Generate in front. Afterwards it may have seen no error, and no other machine's address."""
    opened.tab("Generate")
    yield opened
    assert opened.problems == []
    assert set(_reached) <= {"127.0.0.1", "localhost"}


@pytest.fixture
def models(served):
    return served[0]


def sample(models, labels, settings):
    model = models.load(models.sources[0])
    *_, growth = models.iterate(grow(model, Request(labels, settings)))
    return growth


def read(visitor, address):
    """A picture as the browser gets it."""
    return Image.open(io.BytesIO(visitor.page.request.get(address).body())).convert("RGB")


def read_all(visitor, name="pictures"):
    return [read(visitor, address) for address in visitor.pictures(name)]


@contextmanager
def busy(models):
    """The models' thread has other work to do."""
    done = threading.Event()
    worker = threading.Thread(target=models.run, args=(done.wait,))
    worker.start()
    yield
    done.set()
    worker.join()


def ask(visitor, seed):
    """Fill in a seed that is kept."""
    visitor.page.get_by_label("Seed", exact=True).locator("visible=true").fill(str(seed))
    visitor.page.get_by_label("Keep this seed").check()


def upload(visitor, file):
    with visitor.page.expect_file_chooser() as chooser:
        visitor.button("Upload a picture").click()
    chooser.value.set_files(file)


def test_pictures_slider_download_and_command_by_keyboard(visitor, models):
    expected = sample(models, (0, 1, 2, 3), SETTINGS)
    visitor.page.get_by_label("Keep this seed").focus()
    visitor.page.keyboard.press("Space")
    visitor.button("Generate").focus()
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_text("status", "images a second")
    assert read_all(visitor) == list(expected.pictures)
    assert "4 pictures" in visitor.text("status")
    slider = visitor.page.locator("#scale input[type=range]")
    shown = visitor.pictures()
    for key, scale in (("Home", 0), ("ArrowRight", 1), ("End", 3)):
        slider.focus()
        visitor.page.keyboard.press(key)
        visitor.wait_for_other_pictures(shown)
        shown = visitor.pictures()
        assert read_all(visitor) == list(expected.scales[scale]), key
    with visitor.page.expect_download() as download:
        visitor.page.locator("#download").click()
    assert (
        Image.open(download.value.path()).tobytes()
        == Image.open(expected.write(Path(models.folder) / "x.png")).tobytes()
    )
    visitor.page.get_by_text("The same pictures without this page").click()
    assert write_command(expected.model, expected.request) in visitor.text("command").replace("\n", "")


def test_a_request_is_stopped_while_it_waits_and_the_next_one_is_served(visitor, models):
    ask(visitor, 5)
    shown = visitor.pictures()
    with busy(models):
        visitor.button("Generate").click()
        visitor.page.wait_for_timeout(500)
        visitor.button("Stop").click()
        visitor.wait_for_text("status", "Stopped")
    models.run(lambda: None)  # what was asked for before is done
    visitor.page.wait_for_timeout(500)
    assert visitor.pictures() == shown
    assert visitor.text("status") == "Stopped."
    visitor.generate()
    assert visitor.pictures() != shown


def test_two_visitors_at_once_get_their_own_pictures(visitor, served):
    models, address, browser = served
    visitors, before = (visitor, Visitor(browser, address)), visitor.pictures()
    with busy(models):
        for seed, each in enumerate(visitors, start=1):
            ask(each, seed)
            each.button("Generate").click()
            each.page.wait_for_timeout(300)
    visitor.wait_for_other_pictures(before)
    for seed, each in enumerate(visitors, start=1):
        each.wait_for_text("status", "images a second")
        assert read_all(each) == list(sample(models, (0, 1, 2, 3), SampleConfig(top_k=32, seed=seed)).pictures)
    assert visitors[1].problems == []
    visitors[1].close()


def test_a_picture_is_repainted_where_a_part_is_chosen_and_where_is_drawn(visitor, models):
    """It follows the two visitors, of whom this one's pictures are of seed 1."""
    model = models.load(models.sources[0])
    visitor.tab("Edit")
    visitor.button("Repaint").click()
    visitor.page.get_by_text("choose a picture first").wait_for()
    visitor.button("Take the generated one").click()
    visitor.page.locator("#editor canvas").first.wait_for()
    visitor.page.get_by_label("Left half").check()
    visitor.button("Repaint").click()
    visitor.wait_for_text("edit-status", "Repainted 50% of the picture as 0, seed 0.")
    before = sample(models, (0,), SampleConfig(top_k=32, seed=1)).pictures[0]
    after = model.pipeline.edit(before, editing.build_mask((8, 8), "Left half"), 0, SETTINGS).pil()[0]
    assert read_all(visitor, "edited-pair") == [before, after]
    shown = [image.get_attribute("src") for image in visitor.page.locator("#edited img").all()]
    assert [read(visitor, source) for source in shown] == [editing.enlarge(before), editing.enlarge(after)]
    visitor.page.get_by_label("What I draw").check()
    draw(visitor)
    visitor.button("Repaint").click()
    visitor.page.locator("#edit-status").get_by_text("Repainted 50%").wait_for(state="detached")
    visitor.wait_for_text("edit-status", "Repainted")
    assert 1 <= int(visitor.text("edit-status").split()[1].rstrip("%")) <= 60


def test_a_click_draws_a_new_seed_and_a_surprise_new_classes(visitor, models):
    visitor.page.get_by_label("Keep this seed").uncheck()
    before = visitor.pictures()
    visitor.button("Surprise me").click()
    visitor.wait_for_other_pictures(before)
    visitor.wait_for_text("status", "images a second")
    seed = int(visitor.page.get_by_label("Seed", exact=True).locator("visible=true").input_value())
    assert seed != 0
    classes = [
        int(text.removeprefix("class ")) for text in visitor.page.locator("#pictures .caption-label").all_inner_texts()
    ]
    assert len(classes) == 4
    assert read_all(visitor) == list(sample(models, tuple(classes), SampleConfig(top_k=32, seed=seed)).pictures)


def test_a_wrong_upload_is_told_and_a_right_one_is_looked_into(visitor, tmp_path):
    visitor.tab("Inside")
    (tmp_path / "letter.png").write_text("no picture")
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "photo.png")
    upload(visitor, tmp_path / "letter.png")
    visitor.page.get_by_text("cannot read image letter.png").wait_for()
    upload(visitor, tmp_path / "photo.png")
    visitor.wait_for_text("inside-scales", "The picture in 4 scales; 32 codes")
    assert visitor.page.locator("#inside-scales tbody tr").count() == 4
    assert "no mixture of experts" in visitor.text("inside-experts")


def test_every_tab_fits_a_narrow_screen_and_works(visitor):
    visitor.page.set_viewport_size({"width": 390, "height": 800})
    for name, button, result in (("Compute", "Compare cost", "compute-table"), ("Compare", "Compare", "compare-table")):
        visitor.tab(name)
        visitor.button(button).click()
        visitor.page.locator(f"#{result} tbody tr").nth(1).wait_for()
    for name in ("Generate", "Edit", "Compute", "Inside", "Compare"):
        visitor.tab(name)
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_the_command_serves_the_page_until_it_is_interrupted(tiny_folder, tmp_path):
    """A process of its own, which leaves no files behind."""
    command = [sys.executable, "-c", INTERRUPTIBLE, "demo", str(tiny_folder), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stdout.readline()
        address = line.split("the page is at ")[1].split()[0]
        with urllib.request.urlopen(address) as page:
            assert b"nextscale" in page.read()
        port = address.split(":")[2].strip("/")
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(port)))
        assert list(tmp_path.glob("nextscale-demo-*"))
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "the page has ended\n"
    assert process.returncode == 0
    assert not list(tmp_path.glob("nextscale-demo-*"))


def test_texts_are_asked_for_where_the_model_reads_them(served, tmp_path, tiny_folder):
    """A page of two models: the box of the texts takes the place of the classes."""
    condition = ConditionConfig("text", max_tokens=8, layers=1)
    randomised(tiny_config(condition=condition, mixers=("attention", "cross-attention"))).save_pretrained(tmp_path)
    with serve_models(str(tmp_path), str(tiny_folder)) as (models, address):
        visitor = Visitor(served[2], address)
        visitor.button("Generate").click()
        visitor.page.get_by_text("write at least one text").wait_for()
        visitor.page.get_by_label("Texts").locator("visible=true").fill("a cat\n\n two dogs ")
        ask(visitor, 7)
        visitor.generate()
        expected = sample(models, ("a cat", "two dogs"), SampleConfig(top_k=32, seed=7))
        assert read_all(visitor) == list(expected.pictures)
        assert visitor.page.locator("#pictures .caption-label").all_inner_texts() == ["a cat", "two dogs"]
        visitor.tab("Inside")
        visitor.button("Take the generated one").click()
        visitor.wait_for_text("inside-scales", "The picture in 4 scales; 32 codes")
        assert visitor.page.get_by_label(re.compile(r"\bText\b")).locator("visible=true").input_value() == "a cat"
        assert visitor.problems == []
        visitor.close()
