import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextscale.common.errors import UserError
from nextscale.config.model import ModelConfig
from nextscale.config.parse import from_dict, to_dict
from nextscale.config.presets import PRESETS, preset
from nextscale.config.quickstart import QuickstartConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.tokenizer import TokenizerConfig
from nextscale.config.transformer import DynamicConfig, ExpertsConfig, TransformerConfig


@pytest.mark.parametrize("config", [*PRESETS.values(), QuickstartConfig(), SampleConfig()])
def test_json_round_trip(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_depth_is_the_one_dial():
    assert (TransformerConfig(depth=20).width, TransformerConfig(depth=20).heads) == (1280, 20)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokeniser": {}}, r"config has no setting 'tokeniser'; did you mean 'tokenizer'\?"),
        ({"tokenizer": {"vocab": 3}}, r"config.tokenizer has no setting 'vocab'; did you mean 'vocab_size'\?"),
        ({"tokenizer": {"vocab_size": "many"}}, r"config.tokenizer.vocab_size is 'many'; it must be of type int"),
        ({"tokenizer": {"vocab_size": 1.5}}, "must be of type int"),
        ({"tokenizer": {"attention": 1}}, "must be of type bool"),
        ({"tokenizer": {"channel_multipliers": 3}}, "must be a list"),
        ({"transformer": {"condition": {"kind": "sound"}}}, "it must be one of 'class'"),
        (
            {"transformer": {"mixers": ["attn"]}},
            "transformer.mixers: unknown mixer 'attn'; it must be one of 'att",
        ),
        ({"transformer": {"experts": {"router": "top"}}}, "experts.router: unknown router 'top'.*import my_module"),
        (
            {"transformer": {"feed_forward": "mlp"}},
            "feed_forward: unknown feed-forward 'mlp'; it must be one of",
        ),
        ({"transformer": {"feed_forward": "mixture"}}, "feed_forward is mixture, but .* make it dense"),
        ({"transformer": {"options": 3}}, "config.transformer.options must be a table"),
        ({"transformer": {"options": {"sizes": [1, 2]}}}, r"options.sizes is \[1, 2\]; it must be a number, text"),
        ({"transformer": {"depth": 3, "width": 100, "heads": 3}}, "width must be a multiple of heads"),
        ({"tokenizer": {"base_channels": 20}}, "norm_groups"),
        ({"transformer": 3}, "config.transformer must be a table"),
        ({"pyramid": [1, 0]}, "is no side"),
        ({"class_names": ["a", "b"]}, "2 class names for 1000 classes"),
    ],
)
def test_mistakes_are_named_with_their_place(data, message):
    with pytest.raises(UserError, match=message):
        from_dict(ModelConfig, data)


@given(st.sampled_from(["1e-4", "0.0001", 1e-4]))
def test_numbers_that_yaml_reads_as_text_are_taken(value):
    assert (
        from_dict(QuickstartConfig, {"train_tokenizer": {"learning_rate": value}}).train_tokenizer.learning_rate == 1e-4
    )


def test_absent_transformer_is_a_tokenizer_alone():
    assert from_dict(ModelConfig, {"transformer": None}).transformer is None


def test_options_of_registered_parts_are_kept_and_merged():
    options = {"name": "x", "top": 2, "share": 0.5, "on": True, "absent": None}
    config = from_dict(TransformerConfig, {"depth": 2, "options": options})
    assert config.options == options
    assert from_dict(TransformerConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(TransformerConfig, {"options": {"top": 3}}, base=config).options == {**options, "top": 3}
    assert hash(config) == hash(TransformerConfig(depth=2))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "dense"),
        ({"experts": ExpertsConfig(router="smoe")}, "mixture"),
        ({"dynamic": DynamicConfig(activation="relu")}, "dynamic"),
        ({"feed_forward": "dense"}, "dense"),
    ],
)
def test_the_feed_forward_follows_from_the_settings(settings, name):
    assert TransformerConfig(**settings).resolved_feed_forward == name


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'var-d16'"):
        preset("vard16")


def test_image_size_follows_from_pyramid_and_tokenizer():
    assert ModelConfig().image_size == (256, 256)
    assert from_dict(ModelConfig, {"pyramid": "1,2x3"}).image_size == (32, 48)


def test_configs_and_command_line_parse_without_torch():
    """`--help` has to answer at once, so nothing on its way may import torch."""
    code = (
        "import sys, nextscale.cli.parser as c; c.parse(['--help']); c.parse(['info', 'var-d16']); "
        "c.main(['experiment', 'list']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_list_of_commands_needs_no_command():
    code = (
        "import sys, nextscale.cli.parser as c; c.parse(['--help']); "
        "sys.exit(bool({'tyro', 'nextscale.cli.use'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_downsampling():
    assert TokenizerConfig(base_channels=32, channel_multipliers=(1, 1, 2)).downsampling == 4
