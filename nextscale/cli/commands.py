"""The commands of `nextscale`, each a dataclass of its options. Parsed without torch; run imports what it needs."""

from __future__ import annotations

from collections import UserDict
from importlib import import_module
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
        "sparsify": "checkpoints:Sparsify",
        "quantise": "checkpoints:Quantise",
        "tokenizer train": "training:TokenizerTrain",
        "tokenizer evaluate": "training:TokenizerEvaluate",
        "evaluate": "measuring:Evaluate",
        "statistics": "measuring:Statistics",
        "analyse load": "analysis:AnalyseLoad",
        "analyse routing": "analysis:AnalyseRouting",
        "analyse features": "analysis:AnalyseFeatures",
        "analyse errors": "analysis:AnalyseErrors",
        "analyse convergence": "analysis:AnalyseConvergence",
        "analyse dynamic": "analysis:AnalyseDynamic",
        "bench": "measuring:Bench",
        "tune": "tuning:Tune",
        "experiment list": "measuring:ExperimentList",
        "experiment show": "measuring:ExperimentShow",
        "experiment run": "measuring:ExperimentRun",
        "classifier train": "measuring:ClassifierTrain",
        "classifier evaluate": "measuring:ClassifierEvaluate",
        "encoder train": "encoders:EncoderTrain",
        "encoder evaluate": "encoders:EncoderEvaluate",
        "import-official": "checkpoints:ImportOfficial",
        "export-official": "checkpoints:ExportOfficial",
        "info": "use:Info",
        "doctor": "doctor:Doctor",
    }
)
