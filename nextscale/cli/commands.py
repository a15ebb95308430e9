"""The commands of `nextscale`, each a dataclass of its options. Parsed without torch; run imports what it needs."""

from __future__ import annotations

import ast
from collections import UserDict
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


class Commands(UserDict[str, Any]):
    """Name -> class of a command, "module:class" inside `nextscale.cli` until it is asked for: importing all of them
    takes longer than parsing one."""

    def __getitem__(self, name: str) -> Any:
        kind = super().__getitem__(name)
        if not isinstance(kind, str):
            return kind
        module, _, attribute = kind.partition(":")
        return getattr(import_module(f"nextscale.cli.{module}"), attribute)

    def read_summaries(self) -> dict[str, str]:
        """Name -> the first line of the docstring, read from the sources: the list of commands imports none of them."""
        summaries = {}
        for name, kind in self.data.items():
            module, _, attribute = str(kind).partition(":")
            text = _read_docstrings(module)[attribute] if isinstance(kind, str) else kind.__doc__ or ""
            summaries[name] = text.partition("\n")[0]
        return summaries


@cache
def _read_docstrings(module: str) -> dict[str, str]:
    """Class -> docstring, of a module of `nextscale.cli`."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return {n.name: ast.get_docstring(n) or "" for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}


COMMANDS = Commands(
    {
        "quickstart": "training:Quickstart",
        "sample": "use:Sample",
        "reconstruct": "use:Reconstruct",
        "edit": "use:Edit",
        "tokenize": "training:Tokenize",
        "train": "training:Train",
        "resume": "training:Resume",
        "adapt": "checkpoints:Adapt",
        "upcycle": "checkpoints:Upcycle",
        "merge-lora": "checkpoints:MergeLora",
        "sparsify": "checkpoints:Sparsify",
        "quantise": "checkpoints:Quantise",
        "tokenizer train": "training:TokenizerTrain",
        "tokenizer evaluate": "training:TokenizerEvaluate",
        "evaluate": "measuring:Evaluate",
        "statistics": "measuring:Statistics",
        "analyse pyramid": "analysis:AnalysePyramid",
        "analyse load": "analysis:AnalyseLoad",
        "analyse routing": "analysis:AnalyseRouting",
        "analyse features": "analysis:AnalyseFeatures",
        "analyse attention": "analysis:AnalyseAttention",
        "analyse errors": "analysis:AnalyseErrors",
        "analyse copies": "analysis:AnalyseCopies",
        "analyse convergence": "analysis:AnalyseConvergence",
        "analyse dynamic": "analysis:AnalyseDynamic",
        "bench": "measuring:Bench",
        "tune": "tuning:Tune",
        "experiment list": "experiments:ExperimentList",
        "experiment show": "experiments:ExperimentShow",
        "experiment run": "experiments:ExperimentRun",
        "classifier train": "measuring:ClassifierTrain",
        "classifier evaluate": "measuring:ClassifierEvaluate",
        "encoder train": "encoders:EncoderTrain",
        "encoder evaluate": "encoders:EncoderEvaluate",
        "import-official": "checkpoints:ImportOfficial",
        "export-official": "checkpoints:ExportOfficial",
        "card": "card:Card",
        "demo": "demo:Demo",
        "info": "use:Info",
        "doctor": "doctor:Doctor",
    }
)
