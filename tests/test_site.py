"""The documentation site: its reference agrees with the code, every page is in its order, and it builds strictly."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nextscale
from nextscale.cli.commands import COMMANDS
from tests.test_first_hour import read_help
from website import reference

ROOT = Path(__file__).parents[1]
SOUGHT = {
    "own-images.html": ("train", "own", "classes"),
    "official.html": ("load", "official", "weights"),
    "dynamic.html#what-tau-does": ("tau",),
    "extending.html": ("add", "router"),
}
"""Page, or section of a page -> words that somebody searches for who knows VAR and not this project."""

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="needs MkDocs: pip install 'nextscale[docs]', or make docs"
)


@pytest.mark.parametrize("name", COMMANDS)
def test_reference_of_a_command_has_the_options_of_its_help(name):
    _, helped = read_help(name, "--help-all")
    options = {option.name: option for option in reference.list_options(name)}
    assert {o for o in options if o.startswith("--")} == helped.keys() - {"--help"}
    for option, text in helped.items() if helped else ():
        if option != "--help" and text and not re.search(r"-$|- ", text):
            assert _squeeze(options[option].text).startswith(_squeeze(text)[:40]), option
    page = reference.write_command(name, [])
    assert all(f"| `{option}` |" in page for option in options)


def _squeeze(text: str) -> str:
    """Words without spaces: the help breaks lines within them."""
    return re.sub(r"\s|`", "", text)


def test_every_field_of_every_config_is_listed_with_what_it_does():
    pages = {m: reference.write_configs(m, kinds) for m, kinds in reference.list_configs().items()}
    kinds = [kind for found in reference.list_configs().values() for kind in found]
    assert {"SampleConfig", "TransformerConfig", "TrainConfig", "RunConfig"} <= {kind.__name__ for kind in kinds}
    for kind in kinds:
        for field in reference.list_fields(kind):
            assert f"| `{field.name}` |" in pages[kind.__module__.rpartition(".")[2]]
            assert len(field.text.split()) >= 2, f"{kind.__name__}.{field.name}"
    assert "| `cfg` | number, one or several | `1.5` | Classifier-free guidance" in pages["sampling"]


def test_every_page_is_in_the_order_of_the_site():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Loader)
    listed = {page for section in config["nav"] for page in _list_pages(section)}
    written = {path.name for path in ROOT.glob("docs/*.md")}
    assert written == {page for page in listed if "/" not in page} - {"index.md", "changelog.md", "contributing.md"}


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the functions that it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def _list_pages(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in _list_pages(inner)]


def test_citation_and_workflow_are_what_they_should_be():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == nextscale.__version__
    assert all({"type", "title", "authors"} <= paper.keys() for paper in citation["references"])
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "secrets." not in workflow
    actions = re.findall(r"uses: (\S+)", workflow)
    assert actions
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in actions)
    assert {"test", "docs", "publish"} == yaml.safe_load(workflow)["jobs"].keys()


@needs_mkdocs
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    """Its search finds what somebody who knows VAR looks for."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?:[^\"\s>]+)", page.read_text())
        assert loaded == [], page
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())
    titles = {entry["location"]: entry["title"] for entry in index["docs"]}
    assert "reference/commands/sample.html" in titles
    assert titles["reference/settings/sampling.html#sampleconfig"] == "SampleConfig"
    assert titles["reference/python/pipeline.html#nextscale.Pipeline.sample"]
    for page, words in SOUGHT.items():
        assert all(word in titles[page].lower() for word in words), "titles weigh most in the search"


@needs_mkdocs
def test_public_names_without_a_docstring_are_named(tmp_path):
    """Functions, classes, their methods and properties; private names and imported ones need none."""
    import griffe

    from website.public import find_undocumented

    (tmp_path / "part.py").write_text(
        '"""A part."""\nfrom json import loads\n\ndef bare(): ...\ndef _own(): ...\n\nclass Kind:\n    """A kind."""\n'
        "    def call(self): ...\n    def _call(self): ...\n    @property\n    def size(self): ...\n"
        '    def named(self):\n        """Named."""\n'
    )
    part = griffe.load("part", search_paths=[str(tmp_path)])
    assert list(find_undocumented(part)) == ["part.bare", "part.Kind.call", "part.Kind.size"]
