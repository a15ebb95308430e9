"""The data set of letters, from the fonts that matplotlib brings."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from examples.letterforms import LETTERS, draw_letters, find_fonts, main
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
