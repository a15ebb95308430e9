"""What the README shows is what runs."""

import re
from pathlib import Path

import pytest

from nextscale.cli.commands import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example_runs(tiny_folder, tmp_path, monkeypatch):
    """At most five lines, on a model and an image of the names that the README uses."""
    from PIL import Image

    (tmp_path / "my-model").symlink_to(tiny_folder)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 5
    exec(example, {})
    assert (tmp_path / "grid.png").exists()


def test_commands_in_the_readme_parse(monkeypatch):
    from nextscale.cli.parser import parse

    lines = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines()]
    commands = [words[1:] for words in lines if words and words[0] == "nextscale"]
    named = {" ".join(c[:2]) if " ".join(c[:2]) in COMMANDS else c[0] for c in commands}
    assert named == set(COMMANDS), "every command has an example"
    monkeypatch.chdir(Path(__file__).parents[1])
    for command in commands:
        assert parse(command) is not None


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)\)|src=\"([^\"]+)\"", README))
def test_links_point_to_files(path):
    assert (Path(__file__).parents[1] / "".join(path)).exists(), path


def test_tree_in_the_readme_names_what_exists():
    root = Path(__file__).parents[1]
    (tree,) = [b for b in blocks("text") if b.startswith("nextscale/")]
    for line in tree.splitlines()[1:]:
        match = re.match(r"  (\S+)", line)
        if match:
            assert (root / "nextscale" / match[1]).exists(), line
