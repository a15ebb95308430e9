"""The commands of `nextscale`, each a dataclass of its options. Parsed without torch; run imports what it needs."""

from __future__ import annotations

from nextscale.cli.analysis import (
    AnalyseConvergence,
    AnalyseDynamic,
    AnalyseErrors,
    AnalyseFeatures,
    AnalyseLoad,
    AnalyseRouting,
)
from nextscale.cli.checkpoints import Adapt, ExportOfficial, ImportOfficial, Quantise, Sparsify, Upcycle
from nextscale.cli.doctor import Doctor
from nextscale.cli.encoders import EncoderEvaluate, EncoderTrain
from nextscale.cli.measuring import (
    Bench,
    ClassifierEvaluate,
    ClassifierTrain,
    Evaluate,
    ExperimentList,
    ExperimentRun,
    ExperimentShow,
    Statistics,
)
from nextscale.cli.training import Quickstart, Resume, Tokenize, TokenizerEvaluate, TokenizerTrain, Train
from nextscale.cli.tuning import Tune
from nextscale.cli.use import Edit, Info, Reconstruct, Sample

COMMANDS: dict[str, type] = {
    "quickstart": Quickstart,
    "sample": Sample,
    "reconstruct": Reconstruct,
    "edit": Edit,
    "tokenize": Tokenize,
    "train": Train,
    "resume": Resume,
    "adapt": Adapt,
    "upcycle": Upcycle,
    "sparsify": Sparsify,
    "quantise": Quantise,
    "tokenizer train": TokenizerTrain,
    "tokenizer evaluate": TokenizerEvaluate,
    "evaluate": Evaluate,
    "statistics": Statistics,
    "analyse load": AnalyseLoad,
    "analyse routing": AnalyseRouting,
    "analyse features": AnalyseFeatures,
    "analyse errors": AnalyseErrors,
    "analyse convergence": AnalyseConvergence,
    "analyse dynamic": AnalyseDynamic,
    "bench": Bench,
    "tune": Tune,
    "experiment list": ExperimentList,
    "experiment show": ExperimentShow,
    "experiment run": ExperimentRun,
    "classifier train": ClassifierTrain,
    "classifier evaluate": ClassifierEvaluate,
    "encoder train": EncoderTrain,
    "encoder evaluate": EncoderEvaluate,
    "import-official": ImportOfficial,
    "export-official": ExportOfficial,
    "info": Info,
    "doctor": Doctor,
}
