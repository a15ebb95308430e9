"""The README and docs/commands.md show commands, code and files as they are."""

import re
import shlex
from pathlib import Path

from nextscale.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMAND_REFERENCE = (ROOT / "docs" / "commands.md").read_text()


def find_blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def find_commands(text: str) -> list[list[str]]:
    """The arguments of each `nextscale` command in the shell blocks, also of those that torchrun starts."""
    commands = []
    for block in find_blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "nextscale":
                commands.append(words[1:])
            elif "nextscale.cli" in words:
                commands.append(words[words.index("nextscale.cli") + 1 :])
    return commands


def test_python_example_runs(tiny_folder, tmp_path, monkeypatch):
    """At most five lines, on a model and an image of the names that the README uses."""
    from PIL import Image

    (tmp_path / "my-model").symlink_to(tiny_folder)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (example,) = find_blocks(README, "python")
    assert len(example.strip().splitlines()) <= 5
    exec(example, {})
    assert (tmp_path / "grid.png").exists()


def test_every_command_has_an_example_that_parses(monkeypatch):
    from nextscale.cli.parser import parse

    commands = find_commands(README) + find_commands(COMMAND_REFERENCE)
    commands = [c for c in commands if c[0] != "--import"]
    named = {" ".join(c[:2]) if " ".join(c[:2]) in COMMANDS else c[0] for c in commands}
    assert named == set(COMMANDS), "every command has an example"
    monkeypatch.chdir(ROOT)
    for command in commands:
        assert parse(command) is not None, command


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(find_blocks(README, "sh")), re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_tree_in_the_readme_names_what_exists():
    (tree,) = [b for b in find_blocks(README, "text") if b.startswith("nextscale/")]
    names = [match[1] for line in tree.splitlines()[1:] if (match := re.match(r"  (\S+)", line))]
    for name in names:
        assert (ROOT / "nextscale" / name).exists(), name
    folders = {f"{p.name}/" for p in (ROOT / "nextscale").iterdir() if (p / "__init__.py").exists()}
    assert folders <= set(names), "every package has a line"


def test_files_to_read_exist():
    names = re.findall(r"`(\S+\.py)`", README.split("Read in this order")[1])
    assert len(names) >= 6
    for name in names:
        assert (ROOT / "nextscale" / name).exists(), name
