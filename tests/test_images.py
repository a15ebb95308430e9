"""Pictures of every kind become the right RGB; damaged ones become one clear message."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nextscale.common.errors import UserError
from nextscale.data.images import load_image, resize_and_crop, to_tensor

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(source, size=None) -> np.ndarray:
    image = load_image(source, size)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_untouched():
    assert np.array_equal(pixels(saved(Image.fromarray(RGB), "PNG")), RGB)


def test_greyscale_and_one_bit():
    assert np.array_equal(pixels(saved(Image.fromarray(GREY), "PNG")), np.stack([GREY] * 3, -1))
    black_white = Image.fromarray(GREY).convert("1")
    assert np.array_equal(pixels(saved(black_white, "PNG"))[..., 0], np.asarray(black_white) * 255)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return colour * a + 255 * (1 - a)


def test_alpha_is_laid_over_white():
    alpha = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
    rgba = np.dstack([RGB, alpha])
    np.testing.assert_allclose(pixels(saved(Image.fromarray(rgba), "PNG")), over_white(RGB, alpha), atol=1)
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    expected = over_white(np.stack([GREY] * 3, -1), alpha)
    np.testing.assert_allclose(pixels(saved(grey_alpha, "PNG")), expected, atol=1)


def test_palette_with_and_without_transparency():
    palette = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(pixels(saved(palette, "PNG")), np.asarray(palette.convert("RGB")))
    data = saved(palette, "PNG", transparency=3)
    expected = np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB")))
    assert np.array_equal(pixels(data), expected)


def test_cmyk():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    np.testing.assert_allclose(pixels(saved(cmyk, "TIFF")), RGB, atol=2)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        found = pixels(saved(Image.fromarray(deep), form))
        np.testing.assert_allclose(found, np.stack([deep / 257] * 3, -1), atol=0.5)


def png16(values_hw3: np.ndarray) -> bytes:
    """A 16-bit RGB PNG written by hand: PIL cannot write one."""
    h, w, _ = values_hw3.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_hw3)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour():
    deep = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    np.testing.assert_allclose(pixels(png16(deep)), deep / 257, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB),
    }  # fmt: skip
    assert np.array_equal(pixels(saved(Image.fromarray(RGB), "PNG", exif=exif)), turned[orientation])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "green")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixels(data), np.full((6, 6, 3), [255, 0, 0]), atol=3)


def test_size_of_the_model_is_used_as_it_is():
    image = Image.fromarray(RGB)
    assert resize_and_crop(image, (12, 20)) is image


def test_other_sizes_are_resized_on_the_short_side_and_centre_cropped():
    image = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    expected = image.resize((24, 16), Image.Resampling.LANCZOS).crop((4, 0, 20, 16))
    assert np.array_equal(np.asarray(resize_and_crop(image, (16, 16))), np.asarray(expected))
    assert resize_and_crop(image, (10, 30)).size == (30, 10)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
def test_extreme_shapes_stay_small(size):
    assert resize_and_crop(Image.new("RGB", size), (16, 24)).size == (24, 16)


def test_tensor_range():
    tensor = to_tensor(Image.fromarray(np.array([[[0, 255, 127]]], dtype=np.uint8)))
    assert tensor.shape == (3, 1, 1)
    assert tensor.flatten().tolist() == pytest.approx([-1, 1, 127 / 127.5 - 1])


GOOD_PNG = saved(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
GOOD_JPEG = saved(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    "content",
    [b"", b"a text that calls itself a picture", GOOD_PNG[:500], GOOD_JPEG[:500], GOOD_PNG[:40], bytes(1000),
     GOOD_PNG[:200] + bytes(300) + GOOD_PNG[500:]],
    ids=["empty", "text", "truncated png", "truncated jpeg", "header only", "zeros", "corrupt"],
)  # fmt: skip
def test_damaged_files_are_named(content, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read image .*picture\.png") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    assert content or "it is empty" in str(caught.value)


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no image .*nothing\.png"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="cannot read image"):
        load_image(tmp_path)


def test_decompression_bomb_is_refused_quickly(tmp_path):
    """10^10 black pixels in a few bytes, and a size between PIL's warning and its error."""
    for side in (100_000, 10_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        body = b"IHDR" + header
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        path = tmp_path / "bomb.png"
        path.write_bytes(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
        with pytest.raises(UserError, match=r"bomb\.png is too large to be opened safely"):
            load_image(path)
