"""Links, file paths, module names and commands in the README, docs and model cards exist."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from tests.test_readme import find_blocks, find_commands

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("models/*/README.md")),
    ]
}
on_every_page = pytest.mark.parametrize("page", PAGES)
OWN_MODULES = {"my_router.py", "my_mixer.py", "my_ffn.py", "my_condition.py"}
PLACEHOLDERS = {"SOURCE", "NETWORK", "REFERENCE", "NAME", "MODEL", "RUN", "COMMAND"}


def find_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@on_every_page
def test_links_point_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)|src=\"([^\"]+)\"", PAGES[page]):
        target, _, anchor = "".join(link).partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in find_anchors(path.read_text()), f"{page}: no heading for {''.join(link)}"


@on_every_page
def test_files_exist(page):
    """Paths below nextscale/, tests/, benchmarks/, docs/ and models/."""
    for name in re.findall(r"(?<![\w/.-])((?:nextscale|tests|benchmarks|docs|models)/[\w./*-]*[\w*])", PAGES[page]):
        assert list(ROOT.glob(name)), f"{page}: {name}"
    for name in set(re.findall(r"`([\w/]+\.(?:py|c|h))`", PAGES[page])) - OWN_MODULES:
        assert (ROOT / name).exists() or list((ROOT / "nextscale").rglob(name)), f"{page}: {name}"


@on_every_page
def test_names_exist(page):
    """Dotted names of the package, as `nextscale.backends.optimize`."""
    for name in set(re.findall(r"(?<![\w.-])nextscale(?:\.[A-Za-z_]\w*)+", PAGES[page])):
        module, names = name, []
        while True:
            try:
                thing = importlib.import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                names.insert(0, last)
        for attribute in names:
            assert hasattr(thing, attribute), f"{page}: {name}"
            thing = getattr(thing, attribute)


@pytest.mark.parametrize("page", [p for p in PAGES if p not in ("README.md", "docs/commands.md")])
def test_commands_parse(page, monkeypatch):
    from nextscale.cli.parser import parse

    monkeypatch.chdir(ROOT)
    for command in find_commands(PAGES[page]):
        if not PLACEHOLDERS & set(command) and command[0] != "--import":
            assert parse(command) is not None, f"{page}: nextscale {' '.join(command)}"


def test_layers_of_the_architecture_are_those_that_are_checked():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (block,) = [b for b in find_blocks(PAGES["docs/architecture.md"], "text") if b.startswith("cli\n")]
    layers = [re.match(r"\w+(, \w+)*", line)[0] for line in block.splitlines()]
    assert layers == [layer.replace(" | ", ", ") for layer in contract["layers"]]


@on_every_page
def test_benchmarks_exist(page):
    for name in re.findall(r"python -m (benchmarks\.\w+)", PAGES[page]):
        assert (ROOT / (name.replace(".", "/") + ".py")).exists(), f"{page}: {name}"


def test_first_line_of_a_shell_block_starts_a_command():
    """Shell blocks are found as such: each has a command that a reader can run."""
    starts = ("nextscale", "make", "python -m", "torchrun", "OMP_NUM_THREADS=", "pip install")
    for page, text in PAGES.items():
        for block in find_blocks(text, "sh"):
            assert block.startswith(starts), f"{page}: {block.splitlines()[0]}"
