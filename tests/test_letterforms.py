"""The data set of letters, from the fonts that matplotlib brings."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.letterforms import COLOURS, LETTERS, draw_letters, find_fonts, main, read_words
from nextscale.config.data import ReadConfig
from nextscale.data.sources import open_source

matplotlib = pytest.importorskip("matplotlib")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_letters_stand_on_one_line_and_capitals_are_equally_high():
    pictures = draw_letters(FONTS / "DejaVuSans.ttf")
    assert pictures.shape == (52, 32, 32)
    rows = [np.flatnonzero((picture < 128).any(axis=1)) for picture in pictures]
    flat = [rows[LETTERS.index(letter)] for letter in "EFHILTX"]
    assert {(r.min(), r.max()) for r in flat} == {(flat[0].min(), 24)}
    assert 20 <= 25 - flat[0].min() <= 22
    assert rows[LETTERS.index("g")].max() > 25 > 24 == rows[LETTERS.index("x")].max()


def test_families_are_split_and_the_table_is_read_with_its_classes(tmp_path, monkeypatch, capsys):
    for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf"):
        (tmp_path / name).symlink_to(FONTS / name)
    (tmp_path / "copy.ttf").symlink_to(FONTS / "DejaVuSans.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    families = [family for family, _ in find_fonts([tmp_path])]
    assert families == ["DejaVu Sans"] * 3 + ["DejaVu Sans Mono", "DejaVu Serif"]
    share = sorted(zlib.crc32(family.encode()) / 2**32 for family in set(families))[1]  # one family lies below
    out = str(tmp_path / "letters")
    monkeypatch.setattr("sys.argv", ["letterforms", str(tmp_path), "--out", out, "--test-share", str(share)])
    main()
    assert "broken.ttf is left out" in capsys.readouterr().out
    lists = {part: (tmp_path / f"letters-{part}.txt").read_text().splitlines() for part in ("train", "test")}
    assert (len(lists["train"]), len(lists["test"])) == (2, 1)
    assert {*lists["train"], *lists["test"]} == set(families)
    counts = {}
    for part in lists:
        source = open_source(f"{out}-{part}.parquet", (32, 32))
        assert source.class_names == tuple(LETTERS)
        counts[part] = len(source.labels)
    assert sum(counts.values()) == 4 * 52, "the copy is no other font"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DejaVuSans", ("sans",)),
        ("DejaVuSans-Bold", ("bold", "sans")),
        ("DejaVuSerif-BoldItalic", ("bold", "italic", "serif")),
        ("DejaVuSansMono-Oblique", ("italic", "monospaced")),
        ("STIXGeneral", ()),
    ],
)
def test_words_of_a_font_are_those_of_its_tables(name, words):
    assert read_words(FONTS / f"{name}.ttf") == words


def test_captions_say_what_the_pictures_show_and_combinations_are_held_out(tmp_path, monkeypatch, capsys):
    from fontTools.ttLib import TTFont
    from pyarrow import parquet

    for name in ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"):
        (tmp_path / f"{name}.ttf").symlink_to(FONTS / f"{name}.ttf")
    with TTFont(FONTS / "DejaVuSansMono.ttf") as font:
        font.save(tmp_path / "broken.ttf")
    with TTFont(tmp_path / "broken.ttf", lazy=True) as font:
        place = font.reader.tables["OS/2"]
    content = bytearray((tmp_path / "broken.ttf").read_bytes())
    content[place.offset : place.offset + 2] = b"\x00\x63"  # a version that does not exist
    (tmp_path / "broken.ttf").write_bytes(content)
    share = min(zlib.crc32(family.encode()) / 2**32 for family in ("DejaVu Sans", "DejaVu Serif")) + 1e-6
    held_out = ["bold, R", "red on blue", "italic, on white"]
    arguments = ["letterforms", str(tmp_path), "--out", str(tmp_path / "x"), "--test-share", str(share), "--captions"]
    monkeypatch.setattr("sys.argv", [*arguments, "--per-letter", "3", "--hold-out", *held_out])
    main()
    assert "broken.ttf is left out: its style cannot be read" in capsys.readouterr().out
    tables = {part: parquet.read_table(tmp_path / f"x-{part}.parquet") for part in ("train", "test", "held-out")}
    assert sum(map(len, tables.values())) == 3 * 3 * 52
    fits = [
        lambda text: "bold" in text and " R," in text,
        lambda text: "red on blue" in text,
        lambda text: "italic" in text and "on white" in text,
    ]
    seen = set()
    for part, table in tables.items():
        for image, label, text in zip(*(table[n].to_pylist() for n in ("image", "label", "caption")), strict=True):
            assert any(fit(text) for fit in fits) == (part == "held-out"), text
            head, colours = text.split(", ")
            ink, paper = (np.array(COLOURS[name]) for name in colours.split(" on "))
            assert (ink != paper).any()
            pixels = np.asarray(Image.open(io.BytesIO(image["bytes"]))).reshape(-1, 3).astype(float)
            assert head.split()[-1] == LETTERS[label]
            assert (pixels[0] == paper).all()
            nearest = np.abs(pixels - ink).sum(axis=1).min()
            assert nearest < np.abs(paper - ink).sum() / 2, "some pixel is nearly ink"
            seen.add(head.rpartition(" ")[0])
    assert seen == {"a sans", "a bold serif", "a bold italic serif"}
    source = open_source(str(tmp_path / "x-train.parquet"), 32, ReadConfig(allow_empty_classes=True), captioned=True)
    assert source.captions[0] == (tables["train"]["caption"][0].as_py(),)
    first = [table.to_pydict() for table in tables.values()]
    main()
    assert [parquet.read_table(tmp_path / f"x-{part}.parquet").to_pydict() for part in tables] == first
    monkeypatch.setattr("sys.argv", [a for a in arguments if a != "--captions"] + ["--hold-out", "bold"])
    with pytest.raises(SystemExit):
        main()
    assert "are for --captions" in capsys.readouterr().err
