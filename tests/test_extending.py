"""The examples of docs/extending.md work from outside the package: trained, saved, loaded, sampled, FLOPs counted."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from nextscale import Pipeline
from nextscale.cli.parser import main
from nextscale.common.registry import CONDITIONS, FEED_FORWARDS, MIXERS, ROUTERS, list_own_modules
from tests.conftest import check_flops

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
IMPORTS = ["--import", "my_router", "--import", "my_mixer"]
SETTINGS = {
    "transformer": {
        "depth": 2, "width": 32, "heads": 4, "mixers": ["attention", "mean"],
        "experts": {"router": "top-p", "count": 4, "active": 2}, "options": {"top-p": 0.7},
    },
    "images": {"limit": 60, "held_out": 0.1},
    "train": {"steps": 3, "batch_size": 8, "warmup_steps": 1, "log_every": 1},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working folder of a user. What is imported and registered there is forgotten after the test."""
    for registry in (MIXERS, ROUTERS, FEED_FORWARDS, CONDITIONS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in (*EXAMPLES, "broken", "taken"):
        sys.modules.pop(name, None)


def test_examples_are_trained_saved_loaded_sampled_and_counted(folder, tiny_folder, capsys):
    """A router and a mixer in one model."""
    train(folder, SETTINGS, IMPORTS, tiny_folder)
    check_refusals(capsys)
    pipeline = check_commands(IMPORTS, capsys)
    assert "my_router" in list_own_modules(), "so that the process that measures peak memory imports it too"
    assert pipeline.transformer.blocks[0].ffn.router.p == 0.7


def test_a_feed_forward_and_a_condition_of_the_page(folder, tiny_folder, capsys):
    settings = {name: SETTINGS[name] for name in ("images", "train")} | {
        "transformer": {"depth": 2, "width": 32, "heads": 4, "feed_forward": "swiglu"}
        | {"condition": {"kind": "normalized-class", "num_classes": 10}}
    }
    imports = ["--import", "my_ffn", "--import", "my_condition"]
    train(folder, settings, imports, tiny_folder)
    pipeline = check_commands(imports, capsys)
    block = pipeline.transformer.blocks[0]
    assert type(block.ffn).__name__ == "SwiGLU"
    x_BND = torch.randn(1, 3, 32)
    gate, up = block.ffn.gate_and_up(x_BND).split([128, 128], dim=-1)
    output, record = block.ffn(x_BND, None, None)
    assert record is None
    assert torch.allclose(output, block.ffn.down(gate * torch.sigmoid(gate) * up), atol=1e-6)
    cond_BD = pipeline.transformer.condition(pipeline.transformer.condition.parse([0, 3, None])).vector_BD
    assert torch.allclose(cond_BD.norm(dim=-1), torch.ones(3))


def train(folder: Path, settings: dict, imports: list[str], tokenizer: Path) -> None:
    """Train with the examples of the page, in a process of its own."""
    for name, code in EXAMPLES.items():
        assert len(code.splitlines()) < 40
        (folder / f"{name}.py").write_text(code)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [*imports, "train", "config.yaml", "--data", "digits", "--tokenizer", str(tokenizer), "--out", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nextscale.cli", *command, "--device", "cpu"]
    trained = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert trained.returncode == 0, trained.stderr


def check_commands(imports: list[str], capsys) -> Pipeline:
    """The trained model is sampled, its FLOPs counted; the loaded model."""
    for command in (["sample", "run", "--labels", "1,2", "--out", "grid.png"], ["info", "run"]):
        assert main([*imports, *command]) == 0, capsys.readouterr().err
    pipeline = Pipeline.from_pretrained("run")
    check_flops(pipeline.config)
    check_one_function(pipeline)
    return pipeline


def check_refusals(capsys) -> None:
    """A checkpoint whose parts are not registered is refused with one line that names the part."""
    for imports, missing in ([], "router 'top-p'"), (IMPORTS[:2], "mixer 'mean'"):
        assert main([*imports, "sample", "run", "--labels", "1", "--out", "refused.png"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"unknown {missing}" in line
        assert "--import" in line


def check_one_function(pipeline: Pipeline) -> None:
    """An image does not depend on its batch, and all scales at once give the logits of one scale after another."""
    together = pipeline.sample([1, 2]).tokens
    alone = [pipeline.sample([label], first_image=i).tokens for i, label in enumerate((1, 2))]
    assert torch.equal(together, torch.cat(alone))
    steps = list(pipeline.sample_scales([1, 2], cfg=0))
    tokens_BL = torch.cat([step.tokens_BN for step in steps], dim=1)
    with torch.no_grad():
        inputs_BLC = pipeline.tokenizer.teacher_inputs(tokens_BL)
        logits_BLV = pipeline.transformer(torch.tensor([1, 2]), inputs_BLC).logits_BNV
    assert torch.allclose(torch.cat([step.logits_BNV for step in steps], dim=1), logits_BLV, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--import", "no_such_module", "info", "var-d12"], "cannot import 'no_such_module': ModuleNotFoundError"),
        (["--import", "broken", "info", "var-d12"], "cannot import 'broken': ZeroDivisionError"),
        (["--import=taken", "info", "var-d12"], "the router 'stmoe' is already registered"),
        (["info", "var-d12", "--import", "broken"], "cannot import 'broken': ZeroDivisionError"),
        (["--import"], "--import needs the name of a Python module"),
    ],
)
def test_modules_that_cannot_be_imported_are_one_line(options, line, folder, capsys):
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "taken.py").write_text(
        "from nextscale.common.registry import ROUTERS\n\n@ROUTERS.register('stmoe')\nclass Router:\n    pass\n"
    )
    assert main(options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert line in lines[0]


def test_logits_processor_of_the_page_runs(folder, tiny_folder):
    (folder / "my-model").symlink_to(tiny_folder)
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "logits_processors" in c)
    exec(code, {})
    assert (folder / "grid.png").exists()
