"""Images that grow scale by scale, in files, notebooks and terminals."""

import base64
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.common.pictures import tile_images, to_pil
from nextscale.pipeline import Pipeline
from tests.conftest import randomised, tiny_config
from tests.test_dynamic import dynamic_pipeline

LABELS = [0, 3, None]
FAMILIES = {
    "dense": lambda: randomised(tiny_config()),
    "rectangles": lambda: randomised(tiny_config("1,2x1,3x2")),
    "dynamic": dynamic_pipeline,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_is_what_the_first_scales_decode_to(family):
    pipeline = FAMILIES[family]()
    plain = pipeline.sample(LABELS, seed=4)
    grown = pipeline.sample(LABELS, seed=4, growth=True, batch_size=2)
    assert plain.growth == ()
    assert torch.equal(grown.tokens, plain.tokens)
    assert torch.equal(grown.tensor, plain.tensor)
    canvases = list(pipeline.tokenizer.build_canvases(plain.tokens))
    assert len(grown.growth) == len(canvases) == len(pipeline.config.pyramid)
    for images, canvas in zip(grown.growth, canvases, strict=True):
        torch.testing.assert_close(images, (pipeline.tokenizer.decode_canvas(canvas) + 1) / 2, atol=1e-5, rtol=0)
    assert torch.equal(grown.growth[-1], plain.tensor)


def test_growth_of_mixtures_of_codes_and_of_two_models(tiny):
    smooth = tiny.sample(LABELS, seed=4, growth=True, smooth=True)
    assert torch.equal(smooth.growth[-1], tiny.sample(LABELS, seed=4, smooth=True).tensor)
    pipeline = randomised(tiny_config())
    pipeline.refine_with(pipeline)
    refined = pipeline.sample(LABELS, seed=4, growth=True, draft_scales=2)
    plain = pipeline.sample(LABELS, seed=4, growth=True)
    assert all(torch.equal(a, b) for a, b in zip(refined.growth, plain.growth, strict=True))


def test_images_describe_and_show_themselves(tiny):
    images = tiny.sample([0, None], growth=True)
    height, width = tiny.config.image_size
    tokens = tiny.config.pyramid.length
    assert repr(images) == f"Images(2 images of {width}x{height}, {tokens} tokens each: 0, no label)"
    assert repr(tiny.sample(0)).startswith(f"Images(1 image of {width}x{height}")
    grid = tile_images(to_pil(images.tensor), images.captions)
    assert np.array_equal(Image.open(BytesIO(images._repr_png_())), grid)
    ((data,),) = [re.findall(r'^<img src="data:image/webp;base64,([^"]+)"', images.animate()._repr_html_())]
    assert Image.open(BytesIO(base64.b64decode(data))).n_frames == len(tiny.config.pyramid)
    with pytest.raises(UserError, match="growth=True"):
        tiny.sample([0]).animate()


def read_frames(path):
    with Image.open(path) as picture:
        frames = []
        for number in range(picture.n_frames):
            picture.seek(number)
            frames.append(np.asarray(picture.convert("RGB"), dtype=int))
        return frames


def test_the_command_writes_animations(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.webp", "a.gif", "a.png", "a.webp"):  # its own pictures are replaced
        assert main(["sample", str(tiny_folder), "--labels", "0,3", "--seed", "2", "--out", name]) == 0
    pipeline = Pipeline.from_pretrained(tiny_folder)
    growth = pipeline.sample([0, 3], seed=2, growth=True).growth
    grids = [np.asarray(tile_images(to_pil(images), ("0", "3")), dtype=int) for images in growth]
    assert np.array_equal(grids[-1], read_frames("a.png")[0])
    assert all(np.array_equal(a, b) for a, b in zip(read_frames("a.webp"), grids, strict=True))
    assert all(abs(a - b).mean() < 4 for a, b in zip(read_frames("a.gif"), grids, strict=True)), "256 colours"
    pipeline.sample([0, 3], seed=2, growth=True).save("b.webp")
    pipeline.sample([0, 3], seed=2).save("c.webp")
    assert len(read_frames("b.webp")) == len(grids)
    assert np.array_equal(read_frames("a.png")[0].shape, read_frames("c.webp")[0].shape)


SHOW = (
    "from PIL import Image; from nextscale.common.terminal import show; "
    "show(Image.linear_gradient('L').convert('RGB').resize((24, 24)))"
)


def run_in_terminal(answers):
    """What a process prints in a terminal of 80 characters that answers these requests."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["COLORTERM"] = "truecolor"
        os.execv(sys.executable, [sys.executable, "-c", SHOW])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 800, 480))
    printed = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the process has ended
            break
        printed += part
        for request, answer in answers.items():
            if request in part:
                os.write(terminal, answer)
    assert os.waitpid(child, 0)[1] == 0, printed
    return printed


def test_a_terminal_shows_what_it_can():
    blocks = run_in_terminal({})
    assert blocks.count("\u2580".encode()) == 24 * 12
    assert blocks.count(b"\x1bP") == 0
    sixel = run_in_terminal({b"\x1b[c": b"\x1b[?62;4c"})
    assert sixel.count(b"\x1bP") == 1
    assert "\u2580".encode() not in sixel


def test_no_terminal_is_no_error():
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert (
        done.stdout == "note: nothing is shown, because the output is not a terminal, or does not say how wide it is\n"
    )
