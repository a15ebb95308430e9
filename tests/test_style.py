"""Rules of the code base that a reader relies on, kept by reading the sources."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nextscale"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {f: ast.parse(f.read_text()) for f in FILES}


def name_module(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


@pytest.mark.parametrize("file", FILES, ids=name_module)
def test_asserts_speak_and_no_exception_is_swallowed(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{file}:{node.lineno}: an assert without a message"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{file}:{node.lineno}: a bare except"


@pytest.mark.parametrize("file", FILES, ids=name_module)
def test_files_and_functions_can_be_read_in_one_go(file):
    assert len(file.read_text().splitlines()) <= 400
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{file}:{node.lineno}: {node.name} is longer than 60 lines"


def test_models_hold_no_state_of_a_run():
    """No branch on train/eval mode and no cache on a module: the same call is the same function."""
    for folder in ("transformer", "tokenizer"):
        for file in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(TREES[file]):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    assert node.attr not in ("training", "cache"), f"{file}:{node.lineno}"


def test_weights_are_never_unpickled_with_code():
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", f"{file}:{node.lineno}"


def test_public_functions_and_classes_are_documented():
    missing = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
    ]
    assert missing == []
