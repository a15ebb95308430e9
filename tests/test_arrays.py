"""Arrays and types given to the Python interface: taken as what they plainly are, or refused with what was expected."""

import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.common.pictures import to_uint8
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.encoder import EncoderConfig
from nextscale.config.sampling import SampleConfig
from nextscale.data.arrays import fit_picture, list_pictures, load_batch
from nextscale.encoders.classifier import Classifier
from nextscale.encoders.self_supervised import SmallEncoder
from nextscale.evaluation.metrics.lpips import ALEX, VGG, Lpips
from nextscale.evaluation.metrics.reconstruction import psnr, ssim
from nextscale.tokenizer.tokenizer import scale_to_unit
from tests.conftest import randomised, tiny_config

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
"""Two pictures of the model's size, (B, H, W, C)."""
SIZE = (8, 8)


@pytest.fixture(scope="module")
def pipeline():
    return randomised(tiny_config())


def load(images, size=SIZE):
    return load_batch(images, size)[0]


def from_pixels(pixels_BHWC) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels_BHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1


def equal(a, b, atol=1e-6):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def list_forms(tmp_path):
    """The same two pictures in every form, and how far it may lie from the 8-bit values."""
    paths = []
    for i, pixels in enumerate(PIXELS):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    first, tensor = PIXELS.transpose(0, 3, 1, 2), torch.from_numpy(PIXELS)
    yield "paths", paths, 0
    yield "texts", tuple(map(str, paths)), 0
    yield "array of texts", np.array(list(map(str, paths))), 0
    yield "generator", (path for path in paths), 0
    yield "bytes", [path.read_bytes() for path in paths], 0
    yield "PIL", [Image.fromarray(pixels) for pixels in PIXELS], 0
    yield "mixed", [paths[0], PIXELS[1]], 0
    yield "uint8 last", PIXELS, 0
    yield "uint8 first", first, 0
    yield "uint8 torch last", tensor, 0
    yield "uint8 torch first", tensor.permute(0, 3, 1, 2), 0
    yield "list of arrays", list(PIXELS), 0
    yield "list of batches of one", [PIXELS[:1], first[1:]], 0
    for dtype in (np.float32, np.float64, np.float16):
        yield f"{dtype.__name__} last", PIXELS.astype(dtype) / dtype(255), 1e-6 if dtype != np.float16 else 2e-3
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        atol = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
        yield f"{dtype} first", (tensor.permute(0, 3, 1, 2).double() / 255).to(dtype), atol
    yield "with gradient", (tensor.permute(0, 3, 1, 2) / 255).requires_grad_(), 1e-6
    opaque = np.concatenate([PIXELS, np.full((2, 8, 8, 1), 255, np.uint8)], axis=-1)
    yield "RGBA", opaque, 0
    yield "RGBA floats", opaque / 255, 1e-6
    yield "RGBA first", opaque.transpose(0, 3, 1, 2), 0


def test_every_form_of_the_same_pictures_gives_the_same(pipeline, tmp_path):
    """And their likelihoods are those of the files: uint8 gave -1208 nats where -621 is right."""
    expected, tokens = from_pixels(PIXELS), None
    for name, images, atol in list_forms(tmp_path):
        found, captions = load_batch(images, SIZE)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        named = name in ("paths", "texts", "array of texts")
        assert captions == ("0.png", "1.png") if named else len(captions) == 2
        tokens = pipeline.encode(PIXELS) if tokens is None else tokens
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    assert torch.equal(pipeline.encode(paths), tokens)
    nats = pipeline.score(paths, [1, 2])
    for images in (PIXELS, torch.from_numpy(PIXELS).permute(0, 3, 1, 2), PIXELS.transpose(0, 3, 1, 2)):
        assert torch.equal(pipeline.score(images, [1, 2]), nats)
    assert torch.equal(pipeline.reconstruct(pipeline.reconstruct(paths)).tokens[:, :1], pipeline.encode(
        pipeline.reconstruct(paths).tensor)[:, :1])  # fmt: skip


def test_one_image_in_every_form(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "one.png")
    for image in (tmp_path / "one.png", str(tmp_path / "one.png"), (tmp_path / "one.png").read_bytes(),
                  Image.fromarray(PIXELS[0]), PIXELS[0], PIXELS[0].transpose(2, 0, 1), PIXELS[:1],
                  torch.from_numpy(PIXELS[0]) / 255):  # fmt: skip
        equal(load(image), from_pixels(PIXELS[:1]))
    assert load_batch(str(tmp_path / "one.png"), SIZE)[1] == ("one.png",)


def test_grey_and_alpha():
    grey = PIXELS[..., 0]
    expected = from_pixels(np.repeat(grey[..., None], 3, -1))
    for images in (grey[0], grey[0] / 255, grey[:1, None], grey[:1, ..., None], grey[0][None], grey[0][..., None]):
        equal(load(images), expected[:1])
    equal(load(grey[:, None]), expected)
    equal(load(grey[0] > 127), from_pixels(np.repeat(np.where(grey[:1, ..., None] > 127, 255, 0), 3, -1)))
    rgba = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    alpha = rgba[..., 3:] / 255
    over_white = torch.from_numpy((rgba[..., :3] / 255 * alpha + 1 - alpha) * 2 - 1).permute(2, 0, 1)[None].float()
    equal(load(rgba / 255), over_white)
    equal(load(rgba), over_white, atol=2.01 / 255)


def test_arrays_of_other_sizes_are_resized_like_files(tmp_path):
    pixels = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = load(tmp_path / "x.png", (6, 10))
    assert torch.equal(load(pixels, (6, 10)), expected)
    equal(load(pixels / 255, (6, 10)), expected, atol=2.5 / 127.5)
    equal(load(torch.from_numpy(pixels).permute(2, 0, 1) / 255, (6, 10)), expected, atol=2.5 / 127.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 5, 8]), min_size=0, max_size=5), st.sampled_from([(8, 8), (3, 5), (4, 4)]),
    st.sampled_from(["uint8", "float32", "bool"]),
)  # fmt: skip
def test_shapes_against_a_list_of_what_they_mean(shape, size, dtype):
    """Every shape of up to five dimensions is read as the only meaning it has, or refused."""
    values = np.random.default_rng(len(shape)).random(shape)
    array = np.asarray(values if dtype == "float32" else values * 2).astype(dtype)
    meanings = []
    if len(shape) == 2:
        meanings.append(array.reshape(1, *shape, 1))
    if len(shape) in (3, 4):
        batch = array if len(shape) == 4 else array[None]
        first = np.moveaxis(batch, 1, -1) if batch.shape[1] in (1, 3, 4) else None
        last = batch if batch.shape[-1] in (1, 3, 4) else None
        meanings = [m for m in (first, last) if m is not None]
        if len(meanings) == 2:
            meanings = [m for m in meanings if m.shape[1:3] == size]
    if len(meanings) != 1:
        with pytest.raises(UserError, match=re.escape(str(tuple(shape)))):
            list_pictures(array, size)
        return
    pictures, _ = list_pictures(array, size)
    assert len(pictures) == len(meanings[0])
    for picture, meant in zip(pictures, meanings[0], strict=True):
        found = np.asarray(picture) / (255 if isinstance(picture, Image.Image) else 1)
        assert found.shape == (*meant.shape[:2], 3)
        white = {"uint8": 255, "float32": 1, "bool": 1}[dtype]
        meant = meant.astype(np.float64) / white
        over = meant[..., :3] * meant[..., 3:] + 1 - meant[..., 3:] if meant.shape[-1] == 4 else meant
        np.testing.assert_allclose(found, np.broadcast_to(over, found.shape), atol=0.006)


UNIT = np.linspace(-1, 1, 192).reshape(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (UNIT, r"values from -1 to 1; expected uint8, or floating point in \[0, 1\].*\(x \+ 1\) / 2"),
        (UNIT * 127 + 127, r"values from 0 to 254; .* give uint8, or divide by 255"),
        (UNIT * 3, r"values from -3 to 3; expected uint8, or floating point in \[0, 1\]$"),
        (np.where(UNIT > 0.9, np.nan, 0.5), "NaN or infinite"),
        (torch.full((1, 3, 8, 8), torch.inf), "NaN or infinite"),
        ((UNIT * 127 + 127).astype(np.int64), r"int64 of shape \(1, 3, 8, 8\); expected uint8"),
        (np.zeros((8, 8, 3), np.uint16), "uint16 of shape"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "complex64 of shape"),
        (np.zeros((2, 8, 8, 2)), r"the shape \(2, 8, 8, 2\); expected \(H, W\), \(C, H, W\)"),
        (np.zeros((5, 8, 8)), r"the shape \(5, 8, 8\)"),
        (np.zeros((3, 9, 3)), r"channels may come first or last, and the model's size \(8, 8\) does not tell"),
        (np.zeros(3), r"the shape \(3,\)"),
        (np.float32(0.5), r"the shape \(\)"),
        (np.zeros((1, 1, 3, 8, 8)), r"the shape \(1, 1, 3, 8, 8\)"),
        ([], "at least one image is needed; got none"),
        (np.zeros((0, 3, 8, 8)), r"no pixels: its shape is \(0, 3, 8, 8\)"),
        (torch.zeros(2, 3, 0, 8), "no pixels"),
        (5, "must be a path, a PIL picture or an array; got int 5"),
        (None, "got NoneType"),
        ([1, 2], "image 0 must be a path, a PIL picture or an array; got int 1"),
        ([PIXELS[0].tolist()], "image 0 must be .*; got list"),
        ({"image": 3}, "got dict"),
        ({"a.png"}, "got set"),
        ([PIXELS, PIXELS], "image 0 of the list is a batch of 2"),
        ([PIXELS[0], UNIT[0]], "image 1 has values from -1 to 1"),
        ("nothing.png", "there is no image nothing.png"),
        (b"no picture", "cannot read image"),
        (Image.new("RGB", (0, 4)), "no pixels"),
    ],
)
def test_what_is_no_image_is_refused(images, message, pipeline):
    with pytest.raises(UserError, match=message) as caught:
        pipeline.reconstruct(images)
    assert "\n" not in str(caught.value)


def test_rounding_beyond_the_range_is_cut_and_a_folder_is_named(pipeline, tmp_path):
    assert load(np.full((1, 3, 8, 8), 1.0005)).max() == 1
    with pytest.raises(UserError, match="is a folder: give its images"):
        pipeline.encode(tmp_path)


# ---- settings, counts, tokens


def test_settings_of_numpy_and_torch(pipeline):
    expected = pipeline.sample([1], SampleConfig(cfg=2.0, top_k=5, seed=4, temperature=(1.0, 1.0, 0.9, 0.8))).tokens
    given = {"cfg": np.float32(2), "top_k": np.int64(5), "seed": torch.tensor(4),
             "temperature": np.array([1.0, 1.0, 0.9, 0.8])}  # fmt: skip
    assert torch.equal(pipeline.sample([1], **given).tokens, expected)
    given |= {"cfg": torch.tensor(2.0), "temperature": lambda k: np.float64([1.0, 1.0, 0.9, 0.8][k])}
    assert torch.equal(pipeline.sample([1], first_image=np.int64(0), batch_size=np.int32(1), **given).tokens, expected)


def test_settings_made_by_themselves():
    assert SampleConfig(cfg=np.float32(2), top_k=np.array([1, 2]), seed=torch.tensor(3)) == SampleConfig(
        2, (1, 2), seed=3
    )
    assert isinstance(SampleConfig(seed=np.int64(3)).seed, int)
    for wrong in ({"cfg": "much"}, {"seed": None}, {"top_k": 1.5}, {"prune": 0.4}, {"smooth": 2}, {"seed": [1]}):
        with pytest.raises(UserError, match=rf"sampling\.{next(iter(wrong))} is "):
            SampleConfig(**wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1.5}, "sampling.seed is 1.5; it must be of type int"),
        ({"seed": True}, "sampling.seed is True"),
        ({"cfg": "much"}, "sampling.cfg is 'much'"),
        ({"cfg": None}, "sampling.cfg is None"),
        ({"smooth": 1}, "sampling.smooth is 1; it must be of type bool"),
        ({"prune": 0.4}, "sampling.prune is 0.4; it must be a list"),
        ({"top_p": np.nan}, "top_p"),
        ({"cgf": 1}, "sampling has no setting 'cgf'; did you mean 'cfg'"),
        ({"config": {"cfg": 1}}, "config must be a SampleConfig; got dict"),
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more; got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"first_image": -1}, "first_image must be a whole number, 0 or more; got -1"),
        ({"first_image": True}, "first_image must be a whole number"),
        ({"first_image": "1"}, "first_image must be a whole number"),
    ],
)
def test_settings_of_the_wrong_type(arguments, message, pipeline):
    with pytest.raises(UserError, match=message):
        pipeline.sample([1], **arguments)


def test_tokens_of_every_integer_type(pipeline):
    tokenizer, tokens = pipeline.tokenizer, pipeline.encode(PIXELS)
    expected = tokenizer.decode(tokens)
    for form in (tokens.numpy(), tokens.to(torch.int16), tokens.to(torch.uint8), tokens.numpy().astype(np.int32)):
        assert torch.equal(tokenizer.decode(form), expected)
        assert torch.equal(tokenizer.teacher_inputs(form), tokenizer.teacher_inputs(tokens))
    for wrong, message in ((tokens.float(), "whole numbers; got float32"), (tokens > 3, "whole numbers; got bool"),
                           (tokens[0], "takes tokens"), (tokens - 100, "must lie in 0 to 31")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            tokenizer.decode(wrong)


# ---- functions that take tensors of one kind


def test_functions_that_take_floats_refuse_bytes_and_ranges(pipeline):
    bytes_B3HW = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    floats_B3HW = bytes_B3HW / 255
    encoder, lpips = SmallEncoder(EncoderConfig(image_size=8, widths=(8, 16), blocks=(0, 0), groups=8)), Lpips(ALEX)
    large = floats_B3HW.repeat(1, 1, 8, 8)
    takes_floats = [pipeline.tokenizer.encode, pipeline.tokenizer, lambda x: lpips(x, x), lambda x: psnr(x, x),
                    lambda x: ssim(x, x), to_uint8, lambda x: encoder(x, (2, 2))]  # fmt: skip
    for function in takes_floats:
        with pytest.raises(UserError, match=r"floating.point"):
            function(bytes_B3HW)
    with torch.no_grad(), pytest.raises(UserError, match=r"LPIPS takes images in \[-1, 1\]; got values from 0 to 255"):
        lpips(large * 255, large)
    for trunk in (ALEX, VGG):
        least = trunk.smallest_side
        assert Lpips(trunk)(*[torch.rand(1, 3, least, 40)] * 2).shape == (1,)
        with pytest.raises(UserError, match=f"needs images of {least} pixels a side or more; got {least - 1} x 40"):
            Lpips(trunk)(*[torch.rand(1, 3, least - 1, 40)] * 2)
    with pytest.raises(UserError, match="equal shape"):
        lpips(large, large[:, :, 1:])
    with pytest.raises(UserError, match=r"the tokenizer takes images in \[-1, 1\]; got values from 0 to 255"):
        pipeline.tokenizer.encode(floats_B3HW * 255)
    with pytest.raises(UserError, match="at least one image; got none"):
        pipeline.tokenizer.encode(floats_B3HW[:0])
    with pytest.raises(UserError, match="equal shapes"):
        psnr(floats_B3HW, floats_B3HW[:1])


def test_functions_that_take_bytes_refuse_floats():
    floats_B3HW = torch.rand(2, 3, 8, 8)
    classifier = Classifier(ClassifierConfig(8, (8, 16), 8), ("a", "b"))
    for function in (classifier, scale_to_unit):
        with pytest.raises(UserError, match=r"takes uint8 images \(B, 3, H, W\); got float32 \(2, 3, 8, 8\)"):
            function(floats_B3HW)


def test_pictures_in_memory_keep_what_files_have():
    """A PIL picture opened from bytes and one made from an array are read alike."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(buffer, "PNG")
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    (picture,), _ = list_pictures(opened, SIZE)
    assert torch.equal(fit_picture(picture, SIZE), load(PIXELS[0])[0])


# ---- nextscale reconstruct


def test_reconstruct_takes_a_folder(tiny_folder, tmp_path, capsys):
    """Of the classes in turn, with what cannot be read named; the same pictures as from the files one by one."""
    names = ["b/2.png", "a/3.png", "a/1.png"]
    for i, name in enumerate(names):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shape = (4, 5, 3) if i == 0 else (20 + i, 30, 3)
        Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "b" / "9.png").write_bytes(b"no picture")
    folder, files = tmp_path / "photos", [tmp_path / "photos" / name for name in sorted(names)]
    for out, paths in (("all", [folder]), ("each", files)):
        options = ["--out", tmp_path / f"{out}.png", "--tokens-out", tmp_path / f"{out}.safetensors"]
        assert main([str(a) for a in ("reconstruct", tiny_folder, *paths, *options)]) == 0
        text = capsys.readouterr().out
        assert "wrote 3 reconstructions" in text
        assert f"note: {folder}/b/2.png is 5 x 4, smaller than the model's 8 x 8; it is enlarged" in text
        assert ("note: left out 1 unreadable images: cannot read image" in text) == (out == "all")
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "each.png").read_bytes()
    both = [load_file(tmp_path / f"{out}.safetensors") for out in ("all", "each")]
    assert torch.equal(both[0]["tokens"], both[1]["tokens"])
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "photos" / "b" / "9.png"):
        assert main(["reconstruct", str(tiny_folder), str(wrong), "--out", str(tmp_path / "x.png")]) == 2
        assert not (tmp_path / "x.png").exists()


# ---- labels


def test_labels_of_every_kind(pipeline):
    for labels in (3, np.int64(3), torch.tensor(3), np.array(3), [3], (3,), range(3, 4), np.array([3], np.uint8),
                   torch.tensor([3], dtype=torch.int16), [np.int8(3)], [torch.tensor(3)], "3", iter([3])):  # fmt: skip
        assert pipeline.label_indices(labels) == [3]
    assert pipeline.label_indices([None, "2", np.str_("1"), 0]) == [None, 2, 1, 0]
    assert torch.equal(pipeline.sample(np.int64(3)).tokens, pipeline.sample([3]).tokens)
    assert torch.equal(pipeline.score(PIXELS[0], torch.tensor(3)), pipeline.score(PIXELS[:1], [3]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least one label is needed; got none"),
        (np.zeros(0, np.int64), "at least one label"),
        ([[1, 2]], r"got \[1, 2\]"),
        (np.ones((2, 1), np.int64), r"got \[1\]"),
        (torch.eye(5), "a label is a class name, a whole number or None"),
        ([True], "got True"),
        (torch.tensor([True, False]), "got True"),
        ([1.5], "got 1.5"),
        ([np.nan], "got nan"),
        (b"3", "got bytes"),
        ({1, 2}, "labels are one label or a list of them; got set"),
        ({"label": 1}, "got dict"),
        ([5], "label 5 is out of range"),
        ([-1], "label -1 is out of range"),
    ],
)
def test_what_is_no_label_is_refused(labels, message, pipeline):
    for call in (pipeline.sample, pipeline.sample_scales, lambda x: pipeline.score(PIXELS, x)):
        with pytest.raises(UserError, match=message):
            call(labels)
