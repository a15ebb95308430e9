"""What the checks of models share: options of the samples, the settings that they give, and one line for an error."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Options of how samples are drawn, beside their number and seed."""
    parser.add_argument("--cfg", type=float, help="strength of guidance")
    parser.add_argument("--top-p", type=float, help="probability of the codes that are drawn from")
    parser.add_argument("--batch-size", type=int, default=50, help="samples at once; they do not depend on it")
    parser.add_argument("--device", default="auto")


def choose_settings(pipeline: Pipeline, options: argparse.Namespace) -> SampleConfig:
    """The model's own settings, with the seed and what the options give."""
    given = {name: getattr(options, name) for name in ("cfg", "top_p") if getattr(options, name) is not None}
    return dataclasses.replace(pipeline.sampling, seed=options.seed, **given)


def run_check(parser: argparse.ArgumentParser, check: Callable[[argparse.Namespace], dict[str, Any]]) -> dict[str, Any]:
    """The report of a check with the options of the command line; a UserError ends the program with its line."""
    try:
        return check(parser.parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
