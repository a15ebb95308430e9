"""What is imported when: a plain dense model reads few files, and help needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLE = """
import json, sys
from nextscale import Pipeline
Pipeline.from_pretrained("models/var-cifar10", backend="plain").sample([3, 5], top_k=1)
files = {m: sys.modules[m].__file__ for m in sys.modules if m.startswith("nextscale.")}
print(json.dumps({m: len(open(f).read().splitlines()) for m, f in files.items()}))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_a_plain_dense_model_loads_few_modules():
    """None of mixtures, dynamic experts, Mamba, backends, research, and of reading class names.

    Four of the modules are packages of one line. Of the lines about 2,750 are code, the others docstrings and blank.
    """
    lines = json.loads(run(SAMPLE))
    foreign = (
        "mixture",
        "experts",
        "routers",
        "dynamic",
        "thresholds",
        "mamba",
        "scan",
        "backends",
        "research",
        "classes",
    )
    assert [m for m in lines if any(part in m.split(".") for part in foreign)] == []
    assert len(lines) <= 39, sorted(lines)
    assert sum(lines.values()) <= 4980, sum(lines.values())


def test_the_default_backend_loads_no_twin_of_other_models():
    code = SAMPLE.replace(', backend="plain"', "")
    lines = json.loads(run(code))
    assert "nextscale.backends.cpu.linear" in lines
    assert [m for m in lines if m.endswith((".mixture", ".experts", ".dynamic", ".mamba", ".research"))] == []


def test_help_and_options_need_no_torch():
    code = "import sys; from nextscale.cli import main; main(['--help']); print('torch' in sys.modules)"
    assert run(code) == "False"
