"""`nextscale sparsify`: turn a trained dense model into dynamic experts, in stages that can be resumed.

OUT/stages/tune/, split/, routers/, adapt/   a checkpoint of each stage, with its run.json and log.jsonl
OUT/stages/samples/                          samples of the model, where no data are given
OUT/                                         the final checkpoint, sparsify.json and sparsify.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextscale.checkpoints import Checkpoint
from nextscale.checkpoints.native import read_checkpoint
from nextscale.checkpoints.router_fingerprint import check_router_fingerprint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.files import write_json
from nextscale.common.fingerprint import fingerprint_weights
from nextscale.common.plots import note_missing_plot
from nextscale.config.parse import to_dict
from nextscale.config.sparsify import SparsifyConfig
from nextscale.sparsify.convert import check_dense, replace_gelu, split_ffns
from nextscale.sparsify.data import open_data
from nextscale.sparsify.report import plot_report
from nextscale.sparsify.stages import STAGES, Job
from nextscale.training.engine.log import check_loggers


def sparsify(
    source: Path, out: Path, config: SparsifyConfig, world: World, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Run the stages of `config` on the checkpoint in `source`, and write the resulting checkpoint to `out`.

    A stage that is finished with the same settings is skipped; an interrupted one is resumed. Returns the content of
    sparsify.json. Raises UserError when the first stage cannot work on this model, and, unless `accept_changes`, when
    `out` holds a run with other settings.
    """
    if source.resolve() == out.resolve():
        raise UserError(f"--out must be another folder than the model's, {source}")
    checkpoint = read_checkpoint(source)
    _check_start(checkpoint, config)
    check_loggers([name for train in (config.tuning, config.routers, config.adapting) for name in train.loggers])
    if world.main:
        note_missing_plot(out / "sparsify.png", "sparsify.json")
    needs_data = set(config.stages) - {"split"} - ({"tune"} if config.tune == "none" else set())
    data = open_data(source, checkpoint, config, out / "stages" / "samples", world) if needs_data else None
    job = Job(config, data, out / "stages", world, accept_changes, fingerprint_weights(checkpoint.tokenizer))
    report: dict[str, Any] = {"source": str(source), "settings": to_dict(config), "stages": {}}
    for number, name in enumerate(config.stages, start=1):
        if world.main:
            print(f"== {name} ({number} of {len(config.stages)})", flush=True)
        checkpoint, report["stages"][name] = STAGES[name](job, checkpoint)
    if world.main:
        write_checkpoint(out, checkpoint)
        write_json(out / "sparsify.json", report)
        plot_report(report, out / "sparsify.png")
    world.wait()
    return report


def _check_start(checkpoint: Checkpoint, config: SparsifyConfig) -> None:
    """Raise UserError when the first stage cannot work on this model, before anything is done."""
    model, first = check_dense(checkpoint), config.stages[0]
    if first in ("tune", "split"):
        if model.dynamic.experts:
            raise UserError(f"this model's FFNs are divided already, into {model.dynamic.experts} experts")
        if first == "tune" and config.tune != "none":
            replace_gelu(checkpoint, config.scales, config.tune == "late")
        if "split" in config.stages and model.ffn_width % min(config.expert_size, model.ffn_width + 1):
            split_ffns(checkpoint, config.expert_size, config.scales, config.router_width)  # raises, with the reason
    elif not model.dynamic.experts:
        raise UserError(f"stage {first} needs a model whose FFNs are divided; begin with --stages split {first}")
    elif first != "routers":
        if not model.dynamic.router_fingerprint:
            raise UserError(f"stage {first} needs trained routers; begin with --stages routers {first}")
        check_router_fingerprint("this model", checkpoint)
