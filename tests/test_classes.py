"""Classes are matched by their names: what users type, and data that meets something trained, in any order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from nextscale.checkpoints.adapt import NewClass, parse_classes
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.classes import find_class
from nextscale.config.classes import parse_classes as parse_list
from nextscale.config.labels import index_labels
from nextscale.data.classes import Classes, match_classes
from tests.conftest import randomised, tiny_config
from tests.test_cli import fails

NAMES = ("tench, Tinca tinca", "crane", "Crane", "none", "5", "café", "a", "b", "a,b", "cat", "cat")


# ---- what a user types


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("tench, Tinca tinca,a", [0, 6]),
        ("TENCH,tinca  TINCA", [0]),
        ("crane , Crane", [1, 2]),
        ('"none",""', [3, None]),
        ("5,3, 10", [4, 3, 10]),
        ("Cafe\u0301, CAFÉ", [5, 5]),
        ('"a,b","a","b"', [8, 6, 7]),
    ],
)
def test_names_are_understood(text, meant):
    assert parse_list(text, NAMES, len(NAMES)) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CRANE", r"any of the classes 'crane' \(1\), 'Crane' \(2\)"),
        ("cat", r"any of the classes 'cat' \(9\), 'cat' \(10\)"),
        ("None", "both no label and the name of class 3"),
        ("a,b", "read in two ways: 'a' or 'a,b'"),
        ("tench", "did you mean 'tench, Tinca tinca'"),
        ('"7"', "no class named '7'"),
        ("11", "label 11 is out of range: this model has 11 classes, 0 to 10"),
        ("-1", "label -1 is out of range"),
        ("a,,b", "has an empty entry"),
        ('"a', "not closed"),
    ],
)
def test_what_is_ambiguous_or_unknown_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_list(text, NAMES, len(NAMES))


def test_numbers_as_names_are_names():
    """Folders 0 to 10 sort as text; the class 10 is the third, and a number that is no name is not a position."""
    names = ("1", "10", "2")
    assert parse_list("10, 2", names, 3) == [1, 2]
    with pytest.raises(UserError, match="no class named '0': the names are numbers"):
        find_class("0", names, 3)
    assert (find_class("none", names, 3), find_class("2", (), 3)) == (None, 2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(alphabet='ab ,"=5é', min_size=1, max_size=5), min_size=1, max_size=4, unique=True), st.data())
def test_a_quoted_name_always_means_its_class(names, data):
    names = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)) if names else []
    text = ",".join('"' + name.replace('"', '""') + '"' for name in chosen)
    if chosen and not {*names} & {text, *('"' + name.replace('"', '""') + '"' for name in names)}:
        assert [names[i] for i in parse_list(text, names, len(names))] == chosen


def test_the_same_answer_in_every_command(tmp_path, capsys):
    """sample, edit, score, adapt, analyse and Python, with a name of two words, a comma and other case."""
    config = replace(tiny_config("1,2"), class_names=("7", "Tench, tinca", "bee", "none", "emu"))
    pipeline = randomised(config)
    pipeline.save_pretrained(tmp_path / "m")
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    model, picture = str(tmp_path / "m"), str(tmp_path / "p.png")

    def tokens(*arguments):
        assert main([*map(str, arguments), "--tokens-out", str(tmp_path / "t.safetensors")]) == 0
        return load_file(tmp_path / "t.safetensors")["tokens"]

    by_number = pipeline.sample([1, 0, 4, None]).tokens
    text = 'TENCH,Tinca,7,4,""'
    assert torch.equal(tokens("sample", model, "--labels", text, "--out", tmp_path / "o.png"), by_number)
    assert torch.equal(pipeline.sample(text).tokens, by_number)
    assert torch.equal(pipeline.sample(["tench, tinca", "7", np.int64(4), None]).tokens, by_number)
    mask = ["--mask", picture, "--out", tmp_path / "e.png"]
    assert torch.equal(tokens("edit", model, picture, "--label", "tench,TINCA", *mask)[0], by_number[0])
    assert torch.equal(pipeline.score([picture] * 2, ["Bee", "tench,tinca"]), pipeline.score([picture] * 2, [2, 1]))
    assert parse_classes('mine=TENCH, tinca,"x,y"=7,z', config) == (
        NewClass("mine", 1), NewClass("x,y", 0), NewClass("z"),
    )  # fmt: skip
    errors = ["analyse", "errors", model, "--out", tmp_path / "x", "--num", "1"]
    capsys.readouterr()
    for command in (
        ["sample", model, "--out", tmp_path / "o.png", "--labels", "none"],
        ["edit", model, picture, *mask, "--label", "None"],
        [*errors, "--labels", "none"],
        ["adapt", model, "--out", tmp_path / "a", "--classes", "x=none"],
    ):
        assert "both no label and the name of class 3" in fails(capsys, *command)


@pytest.mark.parametrize(
    ("text", "said"),
    [("0", "--classes must be 1 to"), ("-3", "--classes must be 1 to"), ("9" * 30, "--classes must be 1 to"),
     ("cat,cat", "names a class twice: cat"), ("x=9", "label 9 is out of range"), ("=1", "neither NAME nor NAME=OLD")],
)  # fmt: skip
def test_new_classes_that_make_no_sense(text, said):
    with pytest.raises(UserError, match=said):
        parse_classes(text, tiny_config())


@pytest.mark.parametrize("label", [True, 1.5, np.float32(1), torch.tensor(2.0), object()])
def test_what_is_no_label_is_refused(label):
    with pytest.raises(UserError, match="a label is a class name, a whole number or None"):
        index_labels([label], (), 5)
    assert index_labels(torch.tensor(3), (), 5) == index_labels(3, (), 5) == index_labels(np.int8(3), (), 5) == [3]


# ---- a data set's classes and a trained thing's


def classes(*names: str, where: str = "data") -> Classes:
    return Classes.of_data(where, names)


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(6)), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_a_permutation_of_the_names_changes_no_label(order, labels):
    """The plain oracle: a label stands for its name."""
    known = ("ant", "Bee", "cat", "dog, big", "10", "é")
    names = [known[i] for i in order]
    match = match_classes(classes(*names), classes(*known))
    assert [known[i] for i in match.map_labels(torch.tensor(labels)).tolist()] == [names[i] for i in labels]
    assert (match.names, match.note) == (known, "")
    folded = [name.upper().replace("É", "E\u0301") for name in names]
    assert match_classes(classes(*folded), classes(*known)).index == match.index


@pytest.mark.parametrize(
    ("data", "known", "index", "noted"),
    [
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), (0, 1, 3, 2), False),
        (("1", "0", "2"), ("ant", "bee", "cat"), (1, 0, 2), True),  # without names, or folders named by number
        (("ant", "bee", "cat"), ("2", "0", "1"), (1, 2, 0), True),
        (("ant", "bee", "cat"), (), (0, 1, 2), True),
        (("0", "1", "2"), (), (0, 1, 2), False),
        (("2", "0", "1"), (), (2, 0, 1), False),
        (("photos",), ("pictures",), (0,), True),
    ],
)
def test_sides_without_names_are_matched_by_number_with_a_note(data, known, index, noted):
    match = match_classes(classes(*data), Classes("model", known, len(index)))
    assert (match.index, bool(match.note)) == (index, noted)
    if noted and len(index) > 1:
        assert "matched by number" in match.note or "by number" in match.note


@pytest.mark.parametrize(
    ("data", "known", "said"),
    [
        (("cat", "owl"), ("cat", "dog"), "only data has owl; only model has dog"),
        (("cat",), ("cat", "dog"), "only model has dog"),
        (("1", "2", "3"), ("ant", "bee", "cat"), "only data has 1, 2, 3; only model has ant, bee, cat"),
        (("0", "1", "2"), ("1", "x", "y"), "only data has 0, 2; only model has x, y"),
        (("cat", "Cat", "dog"), ("dog", "cat", "CAT"), "occurs more than once"),
        (("crane", "crane", "owl"), ("owl", "crane", "crane"), "occurs more than once"),
    ],
)
def test_other_classes_are_refused_with_what_each_side_lacks(data, known, said):
    with pytest.raises(UserError, match=said):
        match_classes(classes(*data), classes(*known, where="model"))
    assert match_classes(classes(*known), classes(*known)).unchanged, "equal lists are equal, whatever they hold"


def test_a_part_of_the_classes_is_enough_only_where_it_is_asked_for():
    known = classes("ant", "bee", "cat", where="model")
    assert match_classes(classes("cat", "bee"), known, subset=True).index == (2, 1)
    assert match_classes(classes("2"), known, subset=True).index == (2,)
    with pytest.raises(UserError, match="only data has owl"):
        match_classes(classes("cat", "owl"), known, subset=True)
    with pytest.raises(UserError, match="do not have the same classes"):
        match_classes(classes("x", "y"), Classes("model", (), 3), subset=True)
