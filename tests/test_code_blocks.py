"""Every code block of the documentation is run or parsed; one that is neither says why in a comment before it."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from nextscale.cli.parser import main, parse
from tests.test_docs import PAGES, PLACEHOLDERS
from tests.test_readme import find_blocks, find_commands

ROOT = Path(__file__).parents[1]
PARSED_ONLY = {
    "Quickstart": "trains for minutes; tests/test_quickstart.py runs a small one",
    "Demo": "serves a page until Ctrl-C; tests/test_demo.py has its parts",
    "Resume": "continues a training; tests/test_processes.py stops and continues some",
    "Sparsify": "trains for minutes; tests/test_sparsify.py runs small ones",
    "Doctor": "takes a minute; tests/test_doctor.py runs it",
    "Bench": "measures for minutes; tests/test_bench.py runs small ones",
    "Tune": "measures for minutes; tests/test_tune.py runs small ones",
    "ExperimentRun": "trains and measures for minutes; tests/test_experiments.py runs small ones",
}
"""Class of a command whose examples are parsed and not run, and why."""
OTHER_PROGRAMS = {
    "pip": "installs packages",
    "jupytext": "converts notebooks, which tests/test_notebooks.py runs as they are",
    "make": "tests/test_readme.py looks for its targets",
    "torchrun": "its command is parsed",
    "srun": "its command is parsed",
    "python": "benchmarks take minutes; tests/test_docs.py looks for them",
}
"""First word of a line in a shell block that does not start with nextscale, and why it is not run."""
NOT_RUN = re.compile(r"<!-- not run: \S.+ -->\n\Z")
OWN_TESTS = {"docs/extending.md": "tests/test_extending.py", "README.md": "tests/test_readme.py"}
"""Pages whose Python blocks have tests of their own."""


def list_commands() -> dict[str, list[str]]:
    """All different command lines of all pages that stand for no others."""
    commands = [c for text in PAGES.values() for c in find_commands(text)]
    return {shlex.join(c): c for c in commands if not PLACEHOLDERS & set(c) and c[0] != "--import"}


def list_missing(command) -> list[str]:
    """What a command reads and the repository has not."""
    inputs = command.list_files()[1] if hasattr(command, "list_files") else []
    return [str(i.path) for i in inputs if str(i.path) != "digits" and not (ROOT / i.path).exists()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder) -> Path:
    """What a reader has: a clone's models, a model and a photograph of their own."""
    place = tmp_path_factory.mktemp("reader")
    (place / "models").symlink_to(ROOT / "models")
    (place / "my-model").symlink_to(tiny_folder)
    Image.new("RGB", (30, 20), "teal").save(place / "photo.jpg")
    return place


def test_commands_that_need_nothing_else_run(folder, monkeypatch, capsys):
    """In a folder of its own; the others are parsed by tests/test_docs.py."""
    monkeypatch.chdir(ROOT)
    parsed = {line: parse(words) for line, words in list_commands().items()}
    left = {line for line, command in parsed.items() if type(command).__name__ not in PARSED_ONLY}
    runnable = sorted(line for line in left if not list_missing(parsed[line]))
    assert len(runnable) >= 15
    monkeypatch.chdir(folder)
    for line in runnable:
        overwrite = ["--overwrite"] if hasattr(parsed[line], "overwrite") else []
        assert main([*shlex.split(line), *overwrite]) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "page", [page for page, text in PAGES.items() if "```python" in text and page not in OWN_TESTS]
)
def test_python_blocks_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for before, block in re.findall(r"(.*?\n)```python\n(.*?)```", PAGES[page], re.DOTALL):
        if not NOT_RUN.search(before):
            exec(block, {"__name__": page})


@pytest.mark.parametrize("page", PAGES)
def test_other_blocks_say_why_they_are_not_run(page):
    parts = re.split(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for before, language, block in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        assert language, f"{page}: a block without a language: {block}"
        known = language in ("sh", "python", "text")
        assert known or NOT_RUN.search(before), f"{page}: a block of {language} that is not run and does not say why"
    for block in find_blocks(PAGES[page], "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
            assert not words or words[0] == "nextscale" or words[0] in OTHER_PROGRAMS, f"{page}: {line}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_a_page_begins_with_what_it_is_for(page):
    title, first = PAGES[page].split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title), page
    assert re.match(r"[A-Z][^.]*\bpage\b[^.]*", first), f"{page}: {first}"
