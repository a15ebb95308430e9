"""The notebooks run from the first cell to the last, at a size for a test, and say what they should."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.py"))


@pytest.fixture
def said(request, tmp_path, monkeypatch, capsys) -> str:
    """What a notebook prints, run in a folder that has the repository's models."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEXTSCALE_NOTEBOOK", "small")
    runpy.run_path(str(ROOT / "notebooks" / f"{request.param}.py"))
    return capsys.readouterr().out


@pytest.mark.parametrize("said", ["own_pictures"], indirect=True)
def test_from_pictures_to_a_model(said):
    assert "10 classes (training + held-out images): 0 eight" in said
    assert re.search(r"pictures/eight/\d{4}\.png looks most like a [a-z]+\n", said)
    assert [len(tokens.split(",")) for tokens in re.findall(r"^\(\d, \d\) \[(.*)\]$", said, re.MULTILINE)] == [
        1,
        4,
        9,
        16,
    ]


@pytest.mark.parametrize("said", ["experts"], indirect=True)
def test_what_experts_do(said):
    lines = re.findall(r"^block (\d), scale \(\d, \d\): (.*)$", said, re.MULTILINE)
    assert [block for block, _ in lines] == ["1"] * 3 + ["2"] * 3
    for _, shares in lines:
        assert sum(int(share) for share in re.findall(r"\d+", shares)) == pytest.approx(300, abs=4), "three of eight"
    assert re.search(r"with its own experts \d\.\d+ nats per token, with the next ones \d\.\d+", said)


@pytest.mark.parametrize("said", ["half_compute"], indirect=True)
def test_half_the_compute(said):
    shares = {name.strip(): int(share) for name, share in re.findall(r"^(.{26}) \d\.\d\d GFLOP .* (\d+)%", said, re.M)}
    assert list(shares) == ["dense", "dynamic experts, 80 %", "guidance of four scales", "both"]
    assert shares["dense"] == 100
    assert shares["dynamic experts, 80 %"] == pytest.approx(80, abs=6)
    assert shares["guidance of four scales"] == 61
    assert shares["both"] <= 55


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_in_the_percent_format(path):
    """A title, text before each piece of code, and no path that does not exist."""
    head, *cells = re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)
    assert "format_name: percent" in head
    assert cells[0].startswith(" [markdown]\n# # ")
    assert sum(cell.startswith(" [markdown]") for cell in cells) >= len(cells) // 2
    for name in re.findall(r"`((?:docs|models)/[\w/.-]*)`|`(\w+\.py)`", path.read_text()):
        assert (ROOT / (name[0] or f"notebooks/{name[1]}")).exists(), name
