"""Registries of mixers, routers, feed-forwards and conditions."""

import subprocess
import sys

import pytest

from nextscale.common.errors import UserError
from nextscale.common.registry import MIXERS, ROUTERS, Registry


@pytest.fixture
def registry():
    return Registry("part", {"ordered": "collections:OrderedDict"}, reserved=("none",))


def test_built_in_parts_are_imported_when_they_are_used(registry):
    from collections import OrderedDict

    assert registry.names == ("ordered",)
    assert registry.get("ordered") is OrderedDict


def test_registered_classes_are_found(registry):
    @registry.register("mine")
    class Mine:
        pass

    assert "mine" in registry
    assert registry.get("mine") is Mine
    assert registry.register("mine")(Mine) is Mine, "registering the same class again does nothing"


def test_a_name_cannot_stand_for_two_classes(registry):
    with pytest.raises(UserError, match="part 'ordered' is already registered, as collections:OrderedDict"):
        registry.register("ordered")(dict)


@pytest.mark.parametrize("name", ["", "none", "two words", "a,b"])
def test_unusable_names_are_refused(registry, name):
    with pytest.raises(UserError, match="cannot be named"):
        registry.register(name)


def test_an_unknown_name_is_refused_with_the_known_ones_and_what_to_import(registry):
    message = (
        "transformer.parts: unknown part 'mine'; it must be one of 'none', 'ordered'. If it is your own, import the "
        "module that registers it first: `import my_module` in Python, `nextscale --import my_module ...`"
    )
    with pytest.raises(UserError) as error:
        registry.check("mine", "transformer.parts")
    assert message in str(error.value)
    registry.check("none")
    for name in ("mine", "none"):
        with pytest.raises(UserError, match=f"unknown part '{name}'"):
            registry.get(name)


@pytest.mark.parametrize("name", MIXERS.names)
def test_built_in_mixers_exist(name):
    assert isinstance(MIXERS.get(name), type)


def test_built_in_names_need_no_torch():
    code = "import sys, nextscale.common.registry as r; r.MIXERS.check('mamba'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert ROUTERS.names == ("stmoe", "smoe", "expert-choice", "moe++")
