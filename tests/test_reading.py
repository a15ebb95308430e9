"""Files of settings and records: each is read by one strict reader, and whatever is wrong is named in one line."""

import ast
import dataclasses
import json
import re
import typing
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.reading import has_format, parse_json, read_json
from nextscale.common.reading_yaml import read_yaml
from nextscale.config.data import DataConfig
from nextscale.config.files import read_settings
from nextscale.config.log import read_log
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache_head import read_cache_head
from nextscale.pyramid import Pyramid
from nextscale.research.experiments.records import (
    read_costs,
    read_data_name,
    read_finished,
    read_flops,
    read_measures,
    read_report,
    read_threshold,
)
from nextscale.sampling.thresholds import read_budgets
from nextscale.training.engine.log import JsonLog
from nextscale.training.engine.state import StateFiles
from nextscale.training.open_run import list_points

PACKAGE = Path(__file__).parents[1] / "nextscale"
HEAD = {
    "format": "nextscale-tokens", "version": 1, "tokenizer": "ab", "scales": "1,2", "vocab_size": 16,
    "class_names": ["cat", "dog"], "examples": {"train": 8, "held_out": 2}, "views": 1, "shard": 4, "encoder": "",
    "data": "photos", "seed": 0,
}  # fmt: skip
in_tmp_path = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def fault(action, *arguments, **options):
    """The message of the UserError that an action raises: one line that can be printed."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def test_only_the_reading_modules_parse_json_and_yaml():
    calls = ("json.load", "json.loads", "JSONDecoder", "yaml.load", "yaml.safe_load", "yaml.full_load", "raw_decode")
    found = {
        (file.relative_to(PACKAGE).as_posix(), node.attr)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        if f"{ast.unparse(node.value)}.{node.attr}" in calls or node.attr in calls
    }
    assert found == {("common/reading.py", "loads"), ("common/reading_yaml.py", "load")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1,', "Expecting property name"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice in a table"),
        (b"[NaN]", "NaN is no finite number"),
        (b"[-Infinity]", "-Infinity is no finite number"),
        (b"[1e999]", "1e999 is no finite number"),
        (b"[" + b"9" * 5000 + b"]", "is no integer of 64 bits"),
        (b"[18446744073709551616]", "is no integer of 64 bits"),
        (b"[" * 10_000, "nested too deeply"),
        (b'{"a":' * 41 + b"1" + b"}" * 41, "nested too deeply"),
        (b'{"a": "\xff"}', "byte 7 is no UTF-8 text"),
        (b'"\\ud800"', "surrogates"),
        (b'{"\x1b[31m": 1}', "Invalid control character"),
    ],
)
def test_unsound_json_is_refused(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    message = fault(read_json, path)
    assert message.startswith(f"cannot read {path}: ")
    assert reason in message
    assert not has_format(tmp_path, "nextscale")


def test_sound_json_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null, true, "\\u00e9", 18446744073709551615]}')
    assert read_json(path) == {"a": [1, 2.5, None, True, "é", 2**64 - 1]}
    assert parse_json("[" * 40 + "1" + "]" * 40, "it")
    assert parse_json("[Infinity]", "it", finite=False) == [float("inf")]


def test_what_is_no_file_of_a_sensible_size_is_refused(tmp_path):
    assert fault(read_json, tmp_path / "absent.json") == f"there is no {tmp_path}/absent.json"
    assert "no regular file" in fault(read_json, tmp_path)
    assert "no regular file" in fault(read_json, Path("/dev/zero"))
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**26 + 1)
    assert "67,108,865 bytes, more than 67,108,864" in fault(read_json, tmp_path / "large.json")
    assert "null" in fault(read_json, Path("a\0b"))


@given(value=st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8,
))  # fmt: skip
@in_tmp_path
def test_the_reader_takes_whatever_json_writes(value):
    assert parse_json(json.dumps(value), "it") == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train:\n  steps: 1\nimages:\n  flip: true\ntrain:\n  seed: 2\n", "'train' stands twice .* line 1 and line 5"),
        ("train:\n  steps: 1\n  steps: 2\n", "'steps' stands twice in a table: in line 2 and line 3"),
        ("train: {steps: 1, steps: 2}", "'steps' stands twice"),
        ("train:\n  steps: 010\n", "line 2: 010 may be decimal or octal"),
        ("train:\n  steps: 2020-01-01\n", r"train.steps is '2020-01-01'; it must be of type int"),
        ("train:\n  steps: 1:30\n", r"train.steps is '1:30'; it must be of type int"),
        ("train:\n  steps: .inf\n", "train.steps is inf; it must be a finite number"),
        ("train:\n  learning_rate: .nan\n", "train.learning_rate is nan; it must be a finite number"),
        ("train:\n  steps: 1.0e+30\n", "train.steps is 1e.30; it must be of type int"),
        ("train:\n  steps: true\n", "train.steps is True; it must be of type int"),
        ("train:\n  steps: '5'\n", "train.steps is '5'; it must be of type int"),
        ("train:\n  steps: 0\n", "x.yaml: training: steps must be at least 1; got steps=0"),
        (f"train:\n  seed: {'9' * 5000}\n", "line 2: 9999.* is no integer of 64 bits"),
        ("[" * 5000, "nested too deeply"),
        ("train: &a\n  steps: *a\n", "line 1: a reference contains itself"),
        ("\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]), "more than 100000 values"),
        ("? [a]\n: 1", "a list or table as a name"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: \x1b[31m", "is no YAML"),
        ("3", "must be a table"),
    ],
)  # fmt: skip
def test_yaml_that_reads_as_something_else_is_refused(tmp_path, text, reason):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    message = fault(read_settings, RunConfig, path)
    assert str(path) in message
    assert re.search(reason, message), message


def test_yaml_that_is_plain_is_read_as_before(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "train: &t {learning_rate: 1e-4, weight_decay: .5, steps: 1_000, seed: 0x10}\nimages: {flip: yes}\n"
    )
    config = read_settings(RunConfig, path)
    assert (config.train.learning_rate, config.train.weight_decay) == (1e-4, 0.5)
    assert (config.train.steps, config.train.seed, config.images.flip) == (1000, 16, True)
    path.write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\nwhen: 2020-01-01\nempty:\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "when": "2020-01-01", "empty": None}
    (tmp_path / "x.json").write_text('{"train":\t{"steps": 7}}')
    assert read_settings(RunConfig, tmp_path / "x.json").train.steps == 7
    (tmp_path / "x.json").write_text('{"train": {"steps": 7}, "train": {}}')
    assert "'train' stands twice" in fault(read_settings, RunConfig, tmp_path / "x.json")


@pytest.mark.parametrize(
    "sides", [[1, 1.5], [True, 2], [[1.5, 1.5]], [[True, True]], [], [[]], [[1, 2, 3]], [0], [-1], ["²"], [None],
              [4097], [1e30], [float("inf")], [{}], [1] * 257, [4096] * 2]
)  # fmt: skip
def test_sides_that_are_no_integers_are_refused(sides):
    assert fault(from_dict, ModelConfig, {"pyramid": sides}).startswith("config.pyramid: ")
    with pytest.raises(UserError):
        Pyramid(tuple(sides))


VALUES = st.sampled_from(
    [None, True, -1, 0, 3, 1.5, 1e30, float("inf"), float("nan"), 10**400, "", "x", "1", [], [1], {}]
)


@given(data=st.data())
@in_tmp_path
def test_a_setting_of_any_value_is_taken_or_named(data):
    """Of every field of a run's settings, at every depth."""

    def list_fields(cls, prefix=()):
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            yield (*prefix, f.name)
            if dataclasses.is_dataclass(hints[f.name]) and hints[f.name] is not Pyramid:
                yield from list_fields(hints[f.name], (*prefix, f.name))

    path, value = data.draw(st.sampled_from([*list_fields(RunConfig)])), data.draw(VALUES)
    settings = value
    for name in reversed(path):
        settings = {name: settings}
    config, message = RunConfig(), ""
    try:
        config = from_dict(RunConfig, settings, base=config)
    except UserError as error:
        message = str(error)
    if message:
        assert path[-1] in message
        assert message.isprintable()
    else:
        for name in path:
            config = getattr(config, name)
        assert (
            config == (tuple(value) if isinstance(value, list) else value)
            or isinstance(value, dict)
            or value in ("1", 0)
        )


def test_a_field_without_a_default_is_missed():
    @dataclasses.dataclass(frozen=True)
    class Record:
        step: int
        images: DataConfig
        names: tuple[str, ...] = ()

    globals()["Record"] = Record
    assert fault(from_dict, Record, {"images": {}}, "x.json") == "x.json lacks 'step'"
    assert fault(from_dict, Record, {"step": 1}, "x.json") == "x.json lacks 'images'"
    assert len(fault(from_dict, Record, {"step": "x" * 10**6}, "x.json")) < 200


@pytest.mark.parametrize("name", [n for n in HEAD if n not in ("encoder", "data", "seed")])
@pytest.mark.parametrize("value", ["absent", None, -1, 1.5, True, "", [], {}, [3], 1e30, {"train": -1, "held_out": 0}])
def test_a_damaged_field_of_cache_json_is_named(tmp_path, name, value):
    path = tmp_path / "cache.json"
    head = {**HEAD, name: value}
    if value == "absent":
        del head[name]
    if head.get(name) == "" and name == "tokenizer":
        return  # text like any other: it belongs to no tokenizer, which check_tokenizer says
    path.write_text(json.dumps(head))
    message = fault(read_cache_head, path)
    assert message.startswith(str(path))
    assert name in message or name in ("format", "version") or (name, value) == ("scales", "") or "side" in message


def test_a_sound_cache_json_is_read(tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(HEAD))
    assert read_cache_head(path) == HEAD
    path.write_text(json.dumps({n: v for n, v in HEAD.items() if n not in ("encoder", "seed")}))
    assert read_cache_head(path)["shard"] == 4


def test_a_broken_line_within_a_log_is_said(tmp_path, capsys):
    good = [json.dumps({"task": "t", "step": step, "loss": 0.5, "per_scale": [1, 2]}) for step in range(3)]
    bad = [
        "null", "{}", "[1]", '{"task": "t", "step": -1}', '{"task": "t", "step": true}', '{"task": 1, "step": 1}',
        '{"task": "t", "step": 1, "loss": null}', '{"task": "t", "step": 1, "loss": ["x"]}', good[0][:-5], "\x1b[31m",
    ]  # fmt: skip
    for i, line in enumerate(bad):
        path = tmp_path / f"log-{i}.jsonl"
        path.write_text(f"{good[0]}\n{line}\n{good[1]}\n{good[2][:-3]}")
        assert [r["step"] for r in read_log(path)] == [0, 1]
        (note,) = capsys.readouterr().out.splitlines()
        assert note.startswith(f"note: {path}: line 2 cannot be used and was passed over: ")
        assert note.isprintable()
    path.write_text("\n".join([*good, '{"task": "t", "st']))
    assert len(read_log(path)) == 3, "a last line cut short is no fault"
    assert capsys.readouterr().out == ""
    path.write_text('{"task": "t", "step": 1, "gradient_norm": Infinity}\n')
    JsonLog(path, "t", 1).write(2, {"loss": float("nan")})
    assert [r["step"] for r in read_log(path)] == [1, 2], "a loss may be infinite"


def test_a_line_of_a_log_that_was_changed_is_said(tmp_path, capsys):
    """A digit of a finished line; lines in another order are read in that of their steps."""
    path = tmp_path / "log.jsonl"
    for step in range(1, 5):
        JsonLog(path, "t", step).write(step, {"loss": 2.5 / step, "per_scale": [step, 0.5]})
    lines = path.read_text().splitlines(keepends=True)
    assert zlib.crc32(json.dumps({"task": "t", "step": 1, "loss": 2.5, "per_scale": [1, 0.5]}).encode()) == int(
        json.loads(lines[0])["crc32"], 16
    )
    path.write_text("".join([lines[0], lines[3], lines[2], lines[1]]))
    assert [r["step"] for r in read_log(path)] == [1, 2, 3, 4]
    assert "crc32" not in read_log(path)[0]
    assert capsys.readouterr().out == ""
    path.write_text("".join(lines).replace('"loss": 1.25', '"loss": 1.75'))
    assert [r["step"] for r in read_log(path)] == [1, 3, 4]
    assert (
        f"{path}: line 2 cannot be used and was passed over: it does not match its checksum" in capsys.readouterr().out
    )
    path.write_text("".join(lines).replace('"crc32"', '"crc33"', 1).removesuffix("\n") + "\0")
    assert [r["step"] for r in read_log(path)] == [2, 3]
    path.write_text("".join(lines)[:-20])
    assert [r["step"] for r in read_log(path)] == [1, 2, 3]


def test_points_of_a_log_whose_scales_differ():
    log = [{"step": 1, "a": [1, 2]}, {"step": 2, "a": [3]}, {"step": 3, "a": 4}, {"step": 4}]
    assert list_points(log, ("a", 1)) == [(1, 2)]
    assert list_points(log, "a") == [(3, 4)]


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", '{"step": 1}', '{"step": -1, "loss": 1}', '{"step": 1, "loss": NaN}',
                '{"step": 1.5, "loss": 1}', '{"step": 1, "loss": "low"}', '{"step": 1, "loss": 1, "los": 2}']
)  # fmt: skip
def test_a_damaged_record_of_the_best_state_is_named(tmp_path, content):
    files = StateFiles(tmp_path, "t", 2, World())
    (tmp_path / "training").mkdir()
    path = tmp_path / "training" / "t-best.json"
    path.write_text(content)
    assert str(path) in fault(files.read_best)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    files = StateFiles(tmp_path, "t", 2, World())
    assert not files.record_best(1, {"validation_loss": float("nan")})
    assert files.record_best(2, {"validation_loss": 5.0})
    assert not files.record_best(3, {"validation_loss": float("inf")})
    assert (files.read_best().step, files.read_best().loss) == (2, 5.0)


def test_messages_are_one_line_without_codes():
    assert str(UserError("a\x1b[1mb\x1b[0m\nc\r\n  d\x07\u202e")) == "ab c d??"
    assert str(UserError("a\udcff")) == "a\\udcff"
    assert len(str(UserError("x" * 10_000))) == 2000


@pytest.mark.parametrize(
    ("read", "sound", "broken"),
    [
        (lambda p: read_threshold(p), {"tau": 0.5}, [{}, {"tau": -1}, {"tau": [0.5]}, {"tau": None}, {"tau": "low"}]),
        (lambda p: read_flops(p), {"gflop": 1, "flops_share": 0.5}, [{"gflop": 0, "flops_share": 1}, {"gflop": 1}]),
        (lambda p: read_costs(p, 2), {"about": "x", "rows": [{"a": 1}, {}]},
         [{"about": "x", "rows": [{}]}, {"about": "x", "rows": [1, 2]}, {"about": 1, "rows": [{}, {}]}, {"rows": []}]),
        (lambda p: read_measures(p), {"measures": {"net": {"fid": 1}}, "num": 3},
         [{"measures": {}}, {"measures": {"a": {}, "b": {}}}, {"measures": {"a": 3}}, {"measures": []}, {}]),
        (lambda p: read_report(p), {"psnr": 3}, [[], None, 3]),
        (lambda p: read_data_name(p.parent), {"data": "photos", "train": {}}, [{}, {"data": 3}, {"data": None}, []]),
        (lambda p: read_finished(p.parent, 2),
         {"validation_loss": 5, "validation_loss_per_scale": [4, 6], "validation_expert_load": [0.5, 0.5]},
         [{"validation_loss": 5}, {"validation_loss": "low"}, {"validation_loss": 5, "validation_loss_per_scale": [1]},
          {"validation_loss": True}, {"stages": []}, {"stages": {"tune": 3}}, {"validation_expert_load": [1]}, []]),
    ],
    ids=["threshold", "flops", "costs", "measures", "report", "run", "finished"],
)  # fmt: skip
def test_damaged_results_of_experiments_are_named(tmp_path, request, read, sound, broken):
    path = tmp_path / {"run": "run.json", "finished": "finished.json"}.get(request.node.callspec.id, "x.json")
    path.write_text(json.dumps(sound))
    assert read(path)
    for content in broken:
        path.write_text(json.dumps(content))
        assert str(path) in fault(read, path), content


@pytest.mark.parametrize(
    "dynamic",
    [
        3, {"budgets": 3}, {"budgets": [3]}, {"budgets": [{"share": 0.8}]}, {"budgets": [{"share": 0, "tau": [1]}]},
        {"budgets": [{"share": 1, "tau": [2]}]}, {"budgets": [{"share": True, "tau": [1]}]},
        {"budgets": [{"share": 1, "tau": []}]}, {"budgets": [{"share": 1, "tau": [1]}] * 2},
        {"budgets": [{"share": 1, "tau": [1]}, {"share": 0.5, "tau": [1, 1]}]},
    ],
)  # fmt: skip
def test_a_damaged_table_of_budgets_is_refused(dynamic):
    assert "table of budgets cannot be read" in fault(read_budgets, {"dynamic": dynamic})


def test_a_sound_table_of_budgets_is_read():
    rows = [{"share": 0.5, "tau": [0.1, 0.2]}, {"share": 1, "tau": [1, 1]}]
    assert [row.share for row in read_budgets({"dynamic": {"budgets": rows, "calibrated_on": "x"}})] == [1, 0.5]
    assert read_budgets({}) == []
