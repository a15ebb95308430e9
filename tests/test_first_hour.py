"""What somebody with a few photographs reads: help on one page, the time a run takes, and when it learns by heart."""

import contextlib
import io
import json
import re

import pytest

from nextscale.cli.commands import COMMANDS
from nextscale.cli.parser import main, parse
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierRunConfig
from nextscale.config.data import DataConfig
from nextscale.config.log import find_overfitting
from nextscale.config.parse import to_dict
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.tokenizer_training import TokenizerLossConfig, TokenizerRunConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import ExpertsConfig, TransformerConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache_writer import CacheWriter
from nextscale.quickstart.run import find_finished
from nextscale.training.components import _list_overruled
from nextscale.training.engine.progress import TimeEstimate, describe_overfitting, format_duration
from nextscale.training.open_run import check_data
from nextscale.training.transformer import read_run_config
from tests.conftest import randomised, tiny_config
from tests.test_settings import build_images


def read_help(name: str, option: str) -> tuple[int, dict[str, str]]:
    """The lines of a command's help, and the text of each option, without its type and default."""
    out, options, current = io.StringIO(), dict[str, str](), ""
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        parse([*name.split(), option])
    lines = out.getvalue().splitlines()
    for line in (line.strip(" │|") for line in lines):
        start = re.match(r"(--[a-z][\w.-]*)((?: \S+)*)(.*)", line)
        if start:
            current = start[1]
            options[current] = start[3] if start[2].count("{") == start[2].count("}") else start[2] + start[3]
        elif re.match(r"[-─]{9}|[╭╰]|([\w.-]+ )?options$", line):
            current = ""
        elif current:
            options[current] += f" {line}"
    texts = {  # without choices that go on in the next line
        option: re.sub(r"^\{[^{}]*\} ?", "", " ".join(text.split())) for option, text in options.items()
    }
    return len(lines), {n: re.sub(r"\((default:.*|required)\)$", "", text).strip() for n, text in texts.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name):
    _, options = read_help(name, "--help-all")
    assert {option: text for option, text in options.items() if len(text.split()) < 5} == {}


@pytest.mark.parametrize("name", [name for name, kind in COMMANDS.items() if hasattr(kind, "main_options")])
def test_help_of_a_command_with_many_options_is_one_page(name):
    lines, options = read_help(name, "--help")
    _, all_options = read_help(name, "--help-all")
    assert lines <= 75
    assert options.keys() < all_options.keys()
    main_options = [option for option in COMMANDS[name].main_options if f"--{option}" in options]
    words = sum(1 for option in COMMANDS[name].main_options if f"--{option}" not in all_options)
    assert len(main_options) == len(options) == len(COMMANDS[name].main_options) - words, "but for positional words"
    assert words <= 2
    assert all(text in all_options.values() for text in options.values() if text)


def test_long_helps_have_a_short_page():
    for name, kind in COMMANDS.items():
        if not hasattr(kind, "main_options"):
            assert len(read_help(name, "--help")[1]) <= 32, name


def test_hidden_options_are_accepted():
    settings = parse(["quickstart", "--moco.queue", "300", "--train-encoder.betas", "0.9", "0.99"]).settings
    assert (settings.moco.queue, settings.train_encoder.betas) == (300, (0.9, 0.99))
    assert type(settings) is QuickstartConfig


# ---- time


def test_time_is_estimated_from_the_first_steps():
    estimate = TimeEstimate(steps=1000)
    estimate.least_seconds = estimate.least_remaining = 0.0
    texts = [estimate.count_step() for _ in range(6)]
    assert [bool(text) for text in texts] == [False, False, False, True, False, False]
    assert TimeEstimate(steps=1000).count_step() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "1 s"), (99, "99 s"), (600, "10 min"), (3 * 3600, "3.0 h"), (10**6, "11.6 days")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == f"about {text}"


# ---- learning by heart


def log(pairs):
    """Records of validations (training loss, held-out loss), 10 steps apart."""
    records = []
    for i, (training, held_out) in enumerate(pairs, start=1):
        records += [{"step": 10 * i - 5, "loss": training}, {"step": 10 * i, "validation_loss": held_out}]
    return records


@pytest.mark.parametrize(
    ("pairs", "steps"),
    [
        ([(5, 5), (4, 4.5), (2, 4.6), (1, 5.5), (0.1, 12)], (20, 40)),
        ([(5, 5), (4, 4.5), (3, 4.4)], None),
        ([(5, 5), (4, 4.5), (4.5, 9)], None),  # both rise: the learning rate is too high
        ([(5, 5), (4, 4.5), (3, 4.6), (2, 4.7)], None),  # less than a twentieth
        ([(3, -20), (2, -25), (1, -22)], (20, 30)),  # a tokenizer's: minus PSNR
        ([], None),
    ],
)
def test_a_held_out_loss_that_rises_while_the_training_loss_falls_is_found(pairs, steps):
    found = find_overfitting(log(pairs))
    assert (found and (found.best_step, found.step)) == steps
    if found:
        text = describe_overfitting(found, 48, None)
        assert "48 training examples by heart" in text
        assert f"fewer steps (about {steps[0]})" in text


def test_it_is_found_at_one_step_alone():
    """So a run says it once, also when it is resumed."""
    pairs = [(5, 5), (4, 4.5), (1, 5.5), (0.5, 7), (0.2, 9)]
    found = [find_overfitting(log(pairs[:count])) for count in range(len(pairs) + 1)]
    assert [f.step if f else None for f in found] == [None, None, None, 30, 30, 30]


# ---- refusals that depend on the data


def test_a_discriminator_that_starts_after_the_end_of_the_epochs_is_refused():
    config = TokenizerRunConfig(
        train=TrainConfig(epochs=2, batch_size=10), losses=TokenizerLossConfig(adversarial=0.5, adversarial_start=50)
    )
    check_data(config, 1000, 2, "photos")
    with pytest.raises(UserError, match="adversarial_start 50 is not before the end of the run, step 20"):
        check_data(config, 100, 2, "photos")


def test_a_classifier_of_one_class_is_refused():
    check_data(ClassifierRunConfig(), 100, 2, "photos")
    with pytest.raises(UserError, match="photos has one class: a classifier would learn nothing"):
        check_data(ClassifierRunConfig(), 100, 1, "photos")


def test_views_that_would_all_be_equal_are_refused(tmp_path, capsys):
    command = ["tokenize", "digits", "--tokenizer", "x", "--out", str(tmp_path / "c"), "--views", "10"]
    assert main(command) == 2
    assert "would encode the same pixels 10 times" in capsys.readouterr().err


def test_settings_that_the_start_checkpoint_overrules_are_named():
    config = RunConfig(start="model", transformer=TransformerConfig(depth=4, experts=ExpertsConfig(router="smoe")))
    started = TransformerConfig(depth=4, experts=ExpertsConfig(router="stmoe"))
    (note,) = _list_overruled(config, started)
    assert note == "transformer.experts.router has no effect: the transformer is that of model"
    assert _list_overruled(RunConfig(start="model"), started) == []


def test_image_settings_that_a_token_cache_overrules_are_named(tmp_path):
    tokenizer = randomised(tiny_config()).tokenizer
    parts = {"train": build_images(), "held_out": build_images()}
    writer = CacheWriter(tmp_path, tokenizer, parts, views=1, shard=8)
    writer.record_settings(("a",), {"data": "x", "images": to_dict(DataConfig(random_crop=True)), "seed": 0})
    config = RunConfig(data=str(tmp_path), images=DataConfig(random_crop=True, flip=True))
    (note,) = _list_overruled(config, None)
    assert note.startswith("images.flip has no effect: ")
    assert _list_overruled(RunConfig(data=str(tmp_path), images=DataConfig(random_crop=True)), None) == []


# ---- folders of other runs


def test_a_folder_of_another_run_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a quickstart's: it has run.json"):
        find_finished(QuickstartConfig(), tmp_path)


@pytest.mark.parametrize(
    ("table", "command"),
    [("codebook", "tokenizer train"), ("classifier", "classifier train"), ("moco", "encoder train")],
)
def test_resume_names_the_command_of_other_runs(table, command, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({table: {}}))
    with pytest.raises(UserError, match=f"is a run of `nextscale {command}`: run the same command again"):
        read_run_config(tmp_path)


@pytest.mark.parametrize("part", ["sparsify.json", "stages/tune/run.json"])
def test_a_quickstart_into_a_folder_of_sparsify_says_whose_it_is(part, tmp_path, capsys):
    (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / part).write_text("{}")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds a run of `nextscale sparsify`" in error
    assert len(error.splitlines()) == 1
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.json")] == [part]
