"""Values of options that make no sense are refused, in one line that names the option."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

from nextscale.cli.commands import COMMANDS
from nextscale.cli.parser import main, parse
from nextscale.common.errors import UserError
from nextscale.common.files import write_text
from nextscale.config.sampling import SampleConfig
from tests.test_outputs import refuse


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "m", "--labels", "1", "--out", ""],
        ["sample", "m", "--labels", "1", "--out="],
        ["sample", "m", "--labels", "1", "--out", "g.png", "--images_out", " "],
        ["quickstart", "--out", ""],
        ["tokenize", "photos", "--tokenizer", "", "--out", "cache"],
        ["train", "cifar10", "--out", ""],
    ],
)
def test_an_empty_path_is_named(words, capsys):
    assert main(words) == 2
    option = next(w.rstrip("=") for w, v in zip(words, [*words[1:], "x"], strict=True) if not v.strip() or w[-1] == "=")
    assert f"{option} is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate m --out r.json --num -1", "--num must be 0 or more; got -1"),
        ("evaluate m --out r.json --size -1", "--size"),
        ("statistics d --features f --out s.npz --keep 0", "--keep must be 1 or more; got 0"),
        ("quickstart --limit 0", "--limit must be at least 1; got 0"),
        ("quickstart --image_size -1", "--image_size must be 0 (derived from the data) or more; got -1"),
        ("quickstart --train_tokenizer.steps -2", "--train_tokenizer.steps must be at least 1; got -2"),
        ("quickstart --train-tokenizer.steps 5 --train-encoder.steps 0", "--train-encoder.steps must be at least 1"),
        ("train cifar10 --out r --train.batch-size 0", "--train.batch-size must be at least 1; got 0"),
        ("train cifar10 --out r --transformer.condition.num-classes 99999999999999", "--transformer.condition.num-cl"),
        ("train cifar10 --out r --train.seed -1", "--train.seed must lie in 0 to 2^63 - 1; got -1"),
        ("tokenizer evaluate m --data d --limit 0", "--limit must be 1 or more; got 0"),
        (
            "tokenizer train tokenizer-cifar10 --data d --out o --losses.l1 nan",
            "--losses.l1 must be 0 or more; got nan",
        ),
        ("tokenizer train tokenizer-cifar10 --data d --out o --losses.l1 inf", "--losses.l1 must be finite; got inf"),
        ("tokenize d --tokenizer t --out c --shard 0", "--shard must be 1 or more; got 0"),
        ("tokenize d --tokenizer t --out c --images.limit 0", "--images.limit must be 1 or more; got 0"),
        ("bench m --batch-sizes 2 0", "--batch-sizes must be 1 or more; got 2 0"),
        ("bench m --rounds 0", "--rounds must be 1 or more; got 0"),
        ("upcycle m --out o --noise nan", "--noise must be 0 or more; got nan"),
        ("upcycle m --out o --experts.count -1", "--experts.count"),
        ("import-official --vae v --out o --heads 0", "--heads must be 1 or more; got 0"),
        ("import-official --vae v --out o --phi-ratio nan", "--phi-ratio must lie in 0 to 1; got nan"),
        ("sample m --labels 1 --out g.png --batch_size=-1", "--batch_size must be 1 or more; got -1"),
        ("sample m --labels 1 --out g.png --top_k -1", "--top_k must be 0 (off) or more; got -1"),
        ("sample m --labels 1 --out g.png --cfg 1,nan", "--cfg must be a finite number; got 1.0 nan"),
        ("encoder evaluate e --data d --test t --size -1", "--size must be 0 (the encoder's) or more; got -1"),
        ("analyse features m --data d --out o --points 0", "--points must be 1 or more; got 0"),
        ("analyse routing m --data d --out o --image -1", "--image must be 0 or more; got -1"),
    ],
)
def test_options_without_sense_are_refused_by_their_name(command, said, capsys):
    assert said in refuse(capsys, command)


def test_a_boxed_message_has_the_option_as_typed(capsys):
    with pytest.raises(SystemExit):
        parse(["sample", "m", "--labels", "1", "--out", "g.png", "--batch_size", "x"])
    assert "Error parsing --batch_size: invalid literal" in capsys.readouterr().err


def test_a_setting_of_a_file_is_named_as_in_the_file(tmp_path, capsys):
    write_text(tmp_path / "c.yaml", "train: {steps: -1}")
    assert "training: steps must be at least 1; got steps=-1" in refuse(capsys, f"train {tmp_path}/c.yaml --out r")


def list_settings(kind: type, seen: set[type]) -> dict[type, list[str]]:
    """The fields of numbers of every dataclass of settings below a command."""
    if kind in seen:
        return {}
    seen.add(kind)
    found: dict[type, list[str]] = {kind: []}
    for name, hint in get_type_hints(kind).items():
        kinds = {hint, *get_args(hint)}
        for part in list(kinds):
            kinds |= set(get_args(part))
            if is_dataclass(part) and part.__name__ != "Pyramid":
                found |= list_settings(part, seen)
        if kinds & {int, float} and bool not in kinds:
            found[kind].append(name)
    return found


NUMBERS = [
    (kind, name)
    for command in COMMANDS.values()
    for kind, names in list_settings(command, set()).items()
    for name in names
]
ANY_WHOLE_NUMBER = {"seed"}


@pytest.mark.parametrize(("kind", "name"), sorted(set(NUMBERS), key=str), ids=lambda v: getattr(v, "__name__", v))
def test_no_number_may_be_negative_infinite_or_absurd(kind, name):
    """Every numeric option of every command, in its command or its settings."""
    required = {f.name: "x" for f in fields(kind) if f.default is f.default_factory}
    instance = kind(**required)
    value: Any = getattr(instance, name)
    bad: list[Any] = [-1, 10**14] if name not in ANY_WHOLE_NUMBER else [-1]
    hint = str(get_type_hints(kind)[name])
    if "float" in hint:
        bad = [-1.0, float("nan"), float("inf")]
    for number in bad:
        changed = (number,) * max(1, len(value)) if isinstance(value, tuple) else number
        with pytest.raises(UserError, match=name):
            getattr(replace(instance, **{name: changed}), "check", lambda: None)()


def test_sample_settings_have_no_hidden_numbers():
    """The table above reads types: it knows a field of each kind."""
    found = list_settings(SampleConfig, set())[SampleConfig]
    assert {"cfg", "top_k", "tau", "seed", "budget"} <= set(found)
