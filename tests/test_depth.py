"""Pictures of more than 8 bits: white is what the file says, else what the values show, and notes say which."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from nextscale.common import notes
from nextscale.common.errors import UserError
from nextscale.data.images import load_image

RNG = np.random.default_rng(0)
SMAX, SMIN, LARGEST, PHOTOMETRIC = 341, 340, 281, 262


@pytest.fixture(autouse=True)
def _forget_notes():
    notes._counts.clear()
    notes._printed.clear()


def read(data: bytes, tmp_path, name="x.img") -> np.ndarray:
    """The 8-bit RGB of a file, from its path and from its bytes, which must agree."""
    (tmp_path / name).write_bytes(data)
    pixels = np.asarray(load_image(tmp_path / name))
    assert np.array_equal(np.asarray(load_image(data)), pixels)
    return pixels


def write_png(values: np.ndarray, chunks: bytes = b"") -> bytes:
    """A 16-bit PNG of 1 to 4 channels, written by hand with random filters: PIL cannot write one in colour."""
    h, w, channels = values.shape
    lines, before, size = [], np.zeros(w * channels * 2, np.uint8), channels * 2
    for row in values:
        line = np.frombuffer(row.astype(">u2").tobytes(), np.uint8)
        left = np.concatenate([np.zeros(size, np.uint8), line[:-size]])
        kind = int(RNG.integers(3))
        lines.append(bytes([kind]) + (line - [0 * line, left, before][kind]).astype(np.uint8).tobytes())
        before = line

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0))
    said = chunk(b"sBIT", chunks) if chunks else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(lines)))
    return b"\x89PNG\r\n\x1a\n" + header + said + data + chunk(b"IEND", b"")


def write_tiff(values: np.ndarray, **options) -> bytes:
    """A TIFF with these tags, given as t341=..."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for name in [n for n in options if n[1:].isdigit()]:
        tags[int(name[1:])] = options.pop(name)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=tags, **options)
    return buffer.getvalue()


def write_colour_tiff(values: np.ndarray, order: str, compressed: bool) -> bytes:
    """A 16-bit RGB or RGBA TIFF of either byte order, written by hand."""
    h, w, channels = values.shape
    mark = "<" if order == "II" else ">"
    body = values.astype(f"{mark}u2").tobytes()
    body = zlib.compress(body) if compressed else body
    tags = [(256, 3, [w]), (257, 3, [h]), (258, 3, [16] * channels), (259, 3, [8 if compressed else 1]), (262, 3, [2])]
    tags += [(273, 4, [8]), (277, 3, [channels]), (278, 3, [h]), (279, 4, [len(body)])]
    tags += [(338, 3, [2])] if channels == 4 else []
    where, extra, entries = 8 + len(body), b"", b""
    after = where + 2 + 12 * len(tags) + 4
    for tag, kind, numbers in tags:
        packed = struct.pack(f"{mark}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{mark}I", after + len(extra)), extra + packed
        entries += struct.pack(f"{mark}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = order.encode() + struct.pack(f"{mark}HI", 42, where)
    return head + body + struct.pack(f"{mark}H", len(tags)) + entries + bytes(4) + extra


def noise(top: int, shape=(12, 20), dtype=np.uint16) -> np.ndarray:
    values = RNG.integers(0, top + 1, shape)
    values.flat[:2] = 0, top
    return values.astype(dtype)


def expect(pixels: np.ndarray, values: np.ndarray, white: float, atol=0.5001):
    expected = np.repeat(values[..., None], 3, -1) if values.ndim == 2 else values
    np.testing.assert_allclose(pixels, expected * (255 / white), atol=atol)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_pngs_in_every_colour_keep_their_low_bytes(channels, tmp_path):
    values = noise(65535, (9, 7, channels))
    pixels = read(write_png(values), tmp_path)
    colour = values[..., :1].repeat(3, -1) if channels < 3 else values[..., :3]
    alpha = values[..., -1:] / 65535 if channels in (2, 4) else 1
    np.testing.assert_allclose(
        pixels, colour / 257 * alpha + 255 * (1 - alpha), atol=1.5 if channels in (2, 4) else 0.51
    )


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("compressed", [False, True])
def test_sixteen_bit_tiffs_in_colour(order, channels, compressed, tmp_path):
    values = noise(4000, (9, 7, channels))
    values[..., 3:] = 4095
    expect(read(write_colour_tiff(values, order, compressed), tmp_path), values[..., :3], 4095)


@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_in_a_sixteen_bit_png(channels, tmp_path, capsys):
    """By sBIT, whether the values were scaled up as the standard demands or not; without it by the values."""
    values, said = noise(4095, (12, 20, channels)), bytes([12] * channels)
    plain = values if channels == 3 else values[..., 0]
    expect(read(write_png(values, said), tmp_path), plain, 4095)
    expect(read(write_png(values << 4 | values >> 8, said), tmp_path), plain, 4095, atol=1)
    dark = values // 16  # scaled up, and dark: its low bits are empty
    expect(read(write_png(dark << 4, said), tmp_path), plain // 16, 4095, atol=1)
    assert "bits" not in capsys.readouterr().out
    expect(read(write_png(values), tmp_path), plain, 4095)
    assert "x.img does not say which value is white, and none is above 4095: it was read as 12 bits" in (
        capsys.readouterr().out
    )


def test_twelve_bits_in_a_tiff(tmp_path, capsys):
    """By MaxSampleValue; by the values without it; and packed in 12 bits, written by hand."""
    values = noise(3000)
    for tags in ({"t281": 3000}, {"t281": 4095}, {"t341": 4095}):
        expect(read(write_tiff(values, **tags), tmp_path), values, 4095)
    assert capsys.readouterr().out == ""
    expect(read(write_tiff(values), tmp_path), values, 4095)
    assert "read as 12 bits" in capsys.readouterr().out
    dim = noise(200)  # the file says that white is far above
    expect(read(write_tiff(dim, t281=65535), tmp_path), dim, 65535)
    assert "as 8 bits it is nearly black" in capsys.readouterr().out


@settings(max_examples=30, deadline=None)
@given(st.integers(4096, 65535), st.integers(0, 2**31))
def test_sixteen_bits_of_the_whole_range_are_what_they_were(top, seed):
    """Greyscale that uses more than 12 bits: the formula of the version before."""
    values = np.random.default_rng(seed).integers(0, top + 1, (3, 4)).astype(np.uint16)
    values.flat[0] = top
    expected = np.clip(np.rint(values.astype(np.float64) * (255 / 65535)), 0, 255)
    for data in (write_tiff(values), write_png(values[..., None])):
        assert np.array_equal(np.asarray(load_image(data))[..., 0], expected)


def test_black_is_white_where_the_file_says_so(tmp_path):
    values = noise(65535)
    expect(read(write_tiff(values, t262=0), tmp_path), 65535.0 - values, 65535)


@pytest.mark.parametrize(
    ("top", "white"), [(250, 255), (4000, 4095), (60000, 65535), (2**31 - 1, 2**31 - 1), (70000, 2**31 - 1)]
)
def test_int32_tiffs(top, white, tmp_path, capsys):
    values = noise(top, dtype=np.int32)
    expect(read(write_tiff(values), tmp_path), values.astype(np.float64), white)
    out = capsys.readouterr().out
    assert ("read as" in out) == (white < 2**31 - 1)
    assert ("nearly black" in out) == (top == 70000)


def test_values_that_are_no_brightness(tmp_path):
    (tmp_path / "x.tif").write_bytes(write_tiff(np.array([[-1000, 3000]], np.int32)))
    with pytest.raises(UserError, match=r"x\.tif: its values are -1000 to 3000, and negative ones are no brightness"):
        load_image(tmp_path / "x.tif")
    for wrong, message in ((np.nan, "NaN or infinite"), (-0.5, "negative"), (np.inf, "infinite"), (1e6, "up to 1e")):
        with pytest.raises(UserError, match=message):
            load_image(write_tiff(np.array([[0.5, wrong]], np.float32)))


@pytest.mark.parametrize(
    ("top", "tags", "white", "note"),
    [(1.0, {}, 1, ""), (1.2, {}, 1, "those above 1 were cut"), (200.0, {}, 255, "white was taken as 255"),
     (5e4, {}, 65535, "white was taken as 65535"), (900.0, {"t341": 1000.0}, 1000, ""),
     (0.004, {}, 1, "nearly black"), (0.5, {"t341": 0.5}, 0.5, "")],
)  # fmt: skip
def test_float_tiffs(top, tags, white, note, tmp_path, capsys):
    values = (RNG.random((6, 5)) * top).astype(np.float32)
    values.flat[0] = top
    pixels = read(write_tiff(values, **tags), tmp_path)
    expect(pixels, values.clip(0, white), white)
    out = capsys.readouterr().out
    assert (note in out) if note else not out


def test_nearly_white_is_said_and_three_files_of_a_kind_are_named(tmp_path, capsys):
    for i in range(6):
        Image.fromarray(np.full((4, 4), 65000, np.uint16)).save(tmp_path / f"{i}.png")
        load_image(tmp_path / f"{i}.png")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("nearly white" in line for line in lines[:3])
    assert lines[3] == "note: there are more such files; they are not named"
    Image.new("RGB", (4, 4), "black").save(tmp_path / "8.png")
    load_image(tmp_path / "8.png")
    assert capsys.readouterr().out == "", "8-bit pictures are what they are"


def test_pgm_says_its_white(tmp_path):
    body = b"P5 2 1 1023\n" + struct.pack(">2H", 0, 1023)
    assert read(body, tmp_path)[0, :, 0].tolist() == [0, 255]
    assert read(b"P5 2 1 65535\n" + struct.pack(">2H", 0, 512), tmp_path)[0, :, 0].tolist() == [0, 2]


def test_exif_turns_deep_pictures_too(tmp_path):
    values = noise(65535, (4, 6, 3))
    data = write_png(values)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    expect(read(data[:33] + chunk + data[33:], tmp_path), np.rot90(values, -1), 65535)


def test_transparent_values_of_deep_pictures(tmp_path):
    values = noise(65535, (3, 4, 1))
    values[0, 0] = 1234
    data = write_png(values)
    body = struct.pack(">H", 1234)
    chunk = struct.pack(">I", 2) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    expected = np.where(values == 1234, 65535, values)
    expect(read(data[:33] + chunk + data[33:], tmp_path), expected.repeat(3, -1), 65535)


def test_pil_pictures_of_every_mode(tmp_path):
    colours = Image.fromarray(noise(255, (6, 8, 3), np.uint8))
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "I", "F", "RGBX", "RGBa", "La"):
        through = colours.convert("RGBA") if mode in ("RGBa", "La", "PA") else colours
        through = through.convert("LA") if mode == "La" else through
        picture = load_image(through.convert(mode))
        assert (picture.mode, picture.size) == ("RGB", (8, 6)), mode
    with pytest.raises(UserError, match="the image: it has no pixels"):
        load_image(Image.new("RGB", (0, 5)))
