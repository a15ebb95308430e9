"""The data set of letters, from the fonts that matplotlib brings."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.letter_captions import COLOURS, TEMPLATES, describe, read_style
from examples.letterforms import LETTERS, draw_letters, find_fonts, main
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
        ("DejaVuSans", ("regular", "upright", "sans")),
        ("DejaVuSans-Bold", ("bold", "upright", "sans")),
        ("DejaVuSerif-BoldItalic", ("bold", "italic", "serif")),
        ("DejaVuSansMono-Oblique", ("regular", "italic", "monospace")),
        ("STIXGeneral", ("regular", "upright", "")),
    ],
)
def test_words_of_a_font_are_those_of_its_tables(name, words):
    assert tuple(read_style(FONTS / f"{name}.ttf").values()) == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"OS/2.usWeightClass": 250}, ("light", "upright", "sans")),
        ({"OS/2.fsSelection": 32}, ("bold", "upright", "sans")),
        ({"OS/2.fsSelection": 1}, ("regular", "italic", "sans")),
        ({"name": "GWMonospace"}, ("regular", "upright", "monospace")),
        ({"name": "FreeSerif"}, ("regular", "upright", "serif")),
        ({"name": "Mono Sansa"}, ("regular", "upright", "monospace")),
        ({"name": "X", "OS/2.panose.bFamilyType": 3}, ("regular", "upright", "handwriting")),
        ({"name": "X", "OS/2.panose.bSerifStyle": 5}, ("regular", "upright", "serif")),
        (
            {"name": "X", "OS/2.panose.bFamilyType": 0, "OS/2.sFamilyClass": 0xA00},
            ("regular", "upright", "handwriting"),
        ),
        ({"name": "X", "OS/2.panose.bFamilyType": 0, "OS/2.sFamilyClass": 0x0102}, ("regular", "upright", "serif")),
        ({"name": "X", "OS/2.panose.bFamilyType": 0, "OS/2.sFamilyClass": 0}, ("regular", "upright", "")),
    ],
)
def test_each_table_that_says_the_style_is_read(tmp_path, changes, words):
    from fontTools.ttLib import TTFont

    with TTFont(FONTS / "DejaVuSans.ttf") as font:
        for place, value in changes.items():
            if place == "name":
                for entry in (1, 16):
                    font["name"].setName(value, entry, 3, 1, 0x409)
                    font["name"].setName(value, entry, 1, 0, 0)
                continue
            table, *inner, field = place.split(".")
            target = font[table]
            for part in inner:
                target = getattr(target, part)
            setattr(target, field, value)
        font.save(tmp_path / "x.ttf")
    assert tuple(read_style(tmp_path / "x.ttf").values()) == words


def test_each_caption_has_letter_colours_and_a_word_of_style_and_fits_into_64_bytes():
    style = {"weight": "regular", "slant": "upright", "face": "handwriting"}
    orders, counts = set(), set()
    for number in range(400):
        letter = LETTERS[number % 52]
        shown = describe(letter, style, str(number))
        assert len(shown.caption.encode()) < 64, shown.caption
        words = [word.strip(",:") for word in shown.caption.split()]
        said = [word for word in style.values() if word in words]
        assert said, shown.caption
        assert letter in words
        assert shown.ink != shown.paper
        assert ("small" if letter.isupper() else "capital") not in words
        assert words.count(shown.ink) == words.count(shown.paper) == words.count("on") == 1
        counts.add(len(said))
        orders.add(tuple(words.index(word) for word in (letter, shown.ink, said[0])))
        full = describe(letter, style, str(number), say_all=True)
        assert (full.ink, full.paper) == (shown.ink, shown.paper)
        assert {*style.values()} <= {word.strip(",:") for word in full.caption.split()}
        assert sorted(words) == shown.bag.split()
    assert counts == {1, 2, 3}
    assert len(orders) >= len(TEMPLATES)
    assert "regular upright" in describe("a", style | {"face": ""}, "0", say_all=True).caption


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
    arguments += ["--per-letter", "3", "--hold-out", *held_out]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "broken.ttf is left out: its style cannot be read" in capsys.readouterr().out
    tables = {part: parquet.read_table(tmp_path / f"x-{part}.parquet") for part in ("train", "test", "held-out")}
    assert sum(map(len, tables.values())) == 3 * 3 * 52
    for part, table in tables.items():
        for row in table.to_pylist():
            letter, ink, paper = LETTERS[row["label"]], row["ink"], row["paper"]
            fits = row["weight"] == "bold" and letter == "R", (ink, paper) == ("red", "blue")
            assert any((*fits, row["slant"] == "italic" and paper == "white")) == (part == "held-out"), row["caption"]
            pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).reshape(-1, 3).astype(float)
            assert (pixels[0] == COLOURS[paper]).all()
            difference = np.subtract(COLOURS[paper], COLOURS[ink])
            assert np.abs(pixels - COLOURS[ink]).sum(axis=1).min() < np.abs(difference).sum() / 2, "some is nearly ink"
            words = row["bag"].split()
            assert {letter, ink, paper} <= {*words}
            assert {row["weight"], row["slant"], row["face"]} & {*words}
            assert part != "held-out" or {row["weight"], row["slant"], row["face"]} <= {*words}
    source = open_source(str(tmp_path / "x-train.parquet"), 32, ReadConfig(allow_empty_classes=True), captioned=True)
    assert source.captions[0] == (tables["train"]["caption"][0].as_py(),)
    first = [table.to_pydict() for table in tables.values()]
    main()
    assert [parquet.read_table(tmp_path / f"x-{part}.parquet").to_pydict() for part in tables] == first
    source = open_source(str(tmp_path / "x-train.parquet"), 32, ReadConfig(label_column="slant"))
    assert source.class_names == ("italic", "upright")
    monkeypatch.setattr("sys.argv", [a for a in arguments if a != "--captions"])
    with pytest.raises(SystemExit):
        main()
    assert "are for --captions" in capsys.readouterr().err


def test_a_share_of_the_combinations_is_held_out_and_each_of_their_words_is_seen(tmp_path, monkeypatch, capsys):
    from pyarrow import parquet

    for name in ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneral"):
        (tmp_path / f"{name}.ttf").symlink_to(FONTS / f"{name}.ttf")
    arguments = ["letterforms", str(tmp_path), "--out", str(tmp_path / "x"), "--test-share", "0", "--captions"]
    arguments += ["--per-letter", "10", "--hold-out-share", "0.1", "--known-face"]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "no caption of the training file has" not in capsys.readouterr().out
    train, held_out = (parquet.read_table(tmp_path / f"x-{part}.parquet").to_pylist() for part in ("train", "held-out"))
    assert len(train) + len(held_out) == 3 * 52 * 10, "STIXGeneral does not say its face"
    assert 0.1 < len(held_out) / 1560 < 0.28, "about 0.1 + 0.9 * 0.1"
    assert {row["label"] for row in held_out} == {*range(52)}
    groups = ("label", "ink", "paper"), ("label", "weight", "slant", "face")
    seen = [{tuple(row[name] for name in names) for row in train} for names in groups]
    for row in held_out:
        new = [tuple(row[n] for n in names) not in known for names, known in zip(groups, seen, strict=True)]
        assert any(new), row["caption"]
    assert {word for row in held_out for word in row["bag"].split()} <= {w for r in train for w in r["bag"].split()}

    monkeypatch.setattr("sys.argv", [*arguments[:6], "--captions", "--hold-out", "on red"])
    main()
    assert "that no caption of the training file has" not in capsys.readouterr().out, "red is seen as an ink"
    monkeypatch.setattr("sys.argv", [*arguments[:6], "--captions", "--hold-out", "R"])
    main()
    assert "words of held-out captions that no caption of the training file has: R" in capsys.readouterr().out
