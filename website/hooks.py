"""Hooks of MkDocs: pages that are generated, and links between files of the repository.

The files of docs/ and the repository's own pages (README.md, CHANGELOG.md, CONTRIBUTING.md, the cards of models/, the
notebooks) are read in the repository and on the site. Their links are those of the repository; here they become the
site's.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the code of this checkout, whatever is installed

from nextscale.cli.commands import COMMANDS  # noqa: E402
from website import reference  # noqa: E402
from website.public import PYTHON_PAGES, list_undocumented, write_python  # noqa: E402

log = logging.getLogger("mkdocs.hooks.nextscale")  # `mkdocs build --strict` fails for warnings

COPIED = (
    {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
    | {
        f"models/{path.parent.name}/README.md": f"models/{path.parent.name}.md"
        for path in ROOT.glob("models/*/README.md")
    }
    | {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.py")}
)
"""File of the repository -> page of the site."""
PICTURES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("models/*/**/*.png"))
"""Pictures of the cards, under the same names on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages and the reference; complain of public names without a docstring."""
    for name in list_undocumented():
        log.warning("%s is public and has no docstring", name)
    pages = {page: _read_page(ROOT / source) for source, page in COPIED.items()}
    examples = _find_examples((ROOT / "docs" / "commands.md").read_text(encoding="utf-8"))
    for name in COMMANDS:
        text = reference.write_command(name, examples.get(name, []))
        pages[f"reference/commands/{name.replace(' ', '-')}.md"] = text
    for module, kinds in reference.list_configs().items():
        pages[f"reference/settings/{module}.md"] = reference.write_configs(module, kinds)
    for page, (title, intro, names) in PYTHON_PAGES.items():
        pages[f"reference/python/{page}.md"] = write_python(title, intro, names)
    for page, text in pages.items():
        later = "---\nsearch:\n  boost: 0.5\n---\n\n" if page.startswith("reference/") else ""  # guides are found first
        files.append(File.generated(config, page, content=later + text))
    for name in PICTURES:
        files.append(File.generated(config, name, content=(ROOT / name).read_bytes()))
    _fill_navigation(config.nav, sorted(p for p in pages if p.startswith("reference/")))
    return files


def _fill_navigation(nav: Any, pages: list[str]) -> None:
    """Put generated pages in the place of an entry `reference/FOLDER/*.md`."""
    for entries in (e for section in nav for e in section.values() if isinstance(e, list)):
        for entry in entries:
            for name, target in entry.items() if isinstance(entry, dict) else ():
                if isinstance(target, str) and target.endswith("/*.md"):
                    entry[name] = [page for page in pages if page.startswith(target.removesuffix("*.md"))]


def _read_page(path: Path) -> str:
    """A page of the repository as Markdown; the cells of a notebook become text and code blocks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    _, *cells = re.split(r"^# %%", text, flags=re.MULTILINE)
    pages = []
    for cell in cells:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            lines = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            pages.append(re.sub(r"`(docs/[\w-]+\.md)`", r"[\1](../\1)", lines).strip())
        else:
            pages.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(pages)


def _read_title(source: str, target: str) -> str:
    """The first heading of the page that a link of a file of the repository points to."""
    path = (ROOT / source).parent / target.partition("#")[0]
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _find_examples(text: str) -> dict[str, list[str]]:
    """Command -> its lines in the shell blocks of docs/commands.md."""
    found: dict[str, list[str]] = {}
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            words = line.split()
            if words[:1] == ["nextscale"]:
                name = next((n for n in (" ".join(words[1:3]), words[1]) if n in COMMANDS), "")
                found.setdefault(name, []).append(re.sub(r" {2,}#", "  #", line))  # no columns across commands
    return found


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into those of the site. A file that the site has not becomes its name."""
    source = {v: k for k, v in COPIED.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if source.startswith("docs/reference/"):
        return markdown

    def relocate(target: str) -> str | None:
        path, sharp, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return target
        in_repository = os.path.normpath(os.path.join(os.path.dirname(source), path))
        on_site = COPIED.get(in_repository, in_repository.removeprefix("docs/"))
        if on_site == in_repository and (ROOT / in_repository).exists() and files.get_file_from_path(on_site) is None:
            return None
        return os.path.relpath(on_site, os.path.dirname(page.file.src_uri) or ".") + sharp + anchor

    def replace_link(match: re.Match[str]) -> str:
        target = relocate(match[2])
        if target is None:
            return match[1]
        named = re.fullmatch(r"[\w/.-]*\.md", match[1])  # on the site a page has a title instead of a file's name
        return f"[{_read_title(source, match[2]) if named else match[1]}]({target})"

    def replace_source(match: re.Match[str]) -> str:
        return f'src="{relocate(match[1])}"'

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)  # code stays as it is
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", replace_link, parts[i])
        parts[i] = re.sub(r'src="([^"]+)"', replace_source, parts[i])
    return "".join(parts)
