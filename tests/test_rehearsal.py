"""GPU code without a GPU: devices, types and waits of everything that users run (`tests/rehearsal` has the means)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

WAITS = {
    # once for each call of a user
    "pipeline.py:Pipeline.sample": "the result goes to the host",
    "transformer/context.py:index_scales": "once in a process",
    # once for each batch, at its end
    "sampling/sampler.py:check_finite_logits": "damaged weights must not give an image",
    "tokenizer/tokenizer.py:_check_finite": "damaged weights must not give tokens or an image",
    "common/checks.py:check_range": "images in another range would give wrong tokens",
    "tokenizer/tokenizer.py:Tokenizer.check_tokens": "tokens of another model would give a wrong result",
    # training, once for a run
    "training/engine/memory.py:_fetch_inputs": "few examples, to count what a batch needs",
    "training/engine/memory.py:_try_step": "the first step is tried",
    # training, once for each step or more rarely
    "training/engine/checks.py:is_finite": "a step whose loss is not finite must not be taken",
    "training/engine/loop.py:train": "torch's GradScaler asks whether a gradient has overflowed",
    "training/views.py:_create_constants": "once in a process",
    "training/engine/checks.py:report_missing_gradients": "in the first step alone",
    "tokenizer/codebook.py:CodebookLearner._revive": "which codes are dead decides how many there are",
    "training/engine/log.py:StepMetrics.average": "a line of the log",
    "training/engine/log.py:RunLog.log_step": "a line of the log",
    "training/engine/state.py:StateFiles.save": "a state for the disk",
    "training/engine/distributed.py:gather_weights": "a state for the disk",
    "training/engine/optimizer.py:Ema.state_dict": "a state for the disk",
    # validation, once for each batch or more rarely
    "training/validation.py:validate": "what held-out batches gave",
    "training/tokenizer.py:evaluate_tokenizer": "what held-out batches gave",
    "training/classifier.py:measure_classifier": "what held-out batches gave",
    "training/encoder.py:encode_images": "features for the nearest neighbours",
    "evaluation/metrics/codebook.py:CodebookUsage.add": "counts of held-out tokens",
    # layers
    "transformer/feed_forward/experts.py:Dispatch.list_slices": "dynamic experts in float32 and float16 without Triton",
    "backends/dynamic.py:SparseDynamicFeedForward._run_grouped": "dynamic experts in bfloat16 without Triton",
    # building
    "encoders/patches.py:PatchEncoder.__init__": "constants of a new module",
}
"""Where the host may wait for the device, "file:function", and why."""

FLOAT32 = (
    "tokenizer/quantizer.py:", "common/precision.py:", "transformer/scan.py:", "training/moco.py:info_nce",
    "training/views.py:", "transformer/feed_forward/dynamic.py:compute_expert_norms",
)  # fmt: skip
"""Where products are computed in float32 whatever the precision: what chooses tokens or experts, or adds up much."""

LOW = (
    "transformer/attention.py:Attention.project", "transformer/attention.py:Attention.forward",
    "transformer/block.py:AdaLN.forward", "transformer/feed_forward/__init__.py:DenseFeedForward.forward",
    "transformer/mamba.py:Mamba2.continue_from", "transformer/var.py:VAR.predict_logits", "backends/experts.py:",
    "backends/cpu/linear.py:", "tokenizer/autoencoder.py:Decoder.forward", "encoders/classifier.py:Stage.forward",
    "tokenizer/discriminator.py:", "training/moco.py:Branch.forward",
)  # fmt: skip
"""Where all products are in the precision that was asked for."""

OUTPUTS = {"tokens": "int64", "images": "float32", "logits": "float32", "likelihood": "float32", "weight": "float32"}
PRECISIONS = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What each case did, by name."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the rehearsed device with")
    folder = tmp_path_factory.mktemp("rehearsal")
    library, out, base = folder / "device.so", folder / "results.json", Path(torch.__file__).parent
    command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", "-o", library, "-I", base / "include"]
    command += [ROOT / "tests/rehearsal/device.cpp", "-L", base / "lib", f"-Wl,-rpath,{base / 'lib'}"]
    command += ["-lc10", "-ltorch_cpu"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the rehearsed device cannot be built: {built.stderr.splitlines()[0]}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "tests.rehearsal.run", library, out]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_no_operation_mixes_devices_and_every_case_runs_to_its_end(rehearsal):
    errors = {name: case["error"] for name, case in rehearsal.items() if case["error"]}
    assert not errors, f"{len(errors)} of {len(rehearsal)} cases: {list(errors)}\n{next(iter(errors.values()))}"


def test_the_host_waits_only_where_there_is_a_reason(rehearsal):
    found = {}
    for name, case in rehearsal.items():
        for place in case["waits"]:
            found.setdefault(place, name)
    assert found.keys() <= WAITS.keys(), {place: found[place] for place in found.keys() - WAITS.keys()}


def test_a_training_step_waits_for_its_loss_and_its_line_of_the_log(rehearsal):
    """Once for all values of the log, and not for tokens, which were checked on the host, noise or constants."""
    for name in ("train transformer dense bfloat16", "train encoder bfloat16"):
        waits = {place.partition(":")[2]: count for place, count in rehearsal[name]["waits"].items()}
        once = {"report_missing_gradients", "PatchEncoder.__init__", "_create_constants"}
        expected = {"is_finite": 1, "StepMetrics.average": 1, "RunLog.log_step": 1}
        assert {place: count for place, count in waits.items() if place not in once} == expected, name
    assert rehearsal["train transformer guided bfloat16"]["waits"]["common/checks.py:check_range"] == 1


def test_no_backward_pass_sums_the_gradients_of_an_index_slowly(rehearsal):
    slow = {name: case["slow_sums"] for name, case in rehearsal.items() if case["slow_sums"]}
    assert not slow


def test_nothing_waits_in_a_step_that_a_graph_captures(rehearsal):
    cases = {name: set(case["waits"]) for name, case in rehearsal.items() if name.startswith("fixed steps")}
    before = {"transformer/context.py:index_scales"}
    assert len(cases) == 4
    assert all(waits <= before for waits in cases.values()), cases


def test_nothing_waits_for_the_experts_that_kernels_run(rehearsal):
    cases = {name: set(case["waits"]) for name, case in rehearsal.items() if name.startswith("sample with kernels")}
    without = set().union(*(case["waits"] for name, case in rehearsal.items() if name.startswith("sample dynamic")))
    layers = {place for place in WAITS if place.startswith(("transformer/feed_forward/", "backends/"))}
    assert len(cases) == 3
    assert without & layers
    assert not set().union(*cases.values()) & layers, cases


def test_tokens_and_experts_are_chosen_in_float32_and_layers_compute_as_asked(rehearsal):
    seen = set()
    for name, case in rehearsal.items():
        asked = name.split()[-1] if name.split()[-1] in PRECISIONS else ""
        for place, dtypes in case["products"].items():
            if place.startswith(FLOAT32):
                assert dtypes == ["float32"], (name, place)
            elif place.startswith(LOW) and asked:
                assert dtypes == [asked], (name, place)
            seen.add(place)
    unseen = [start for start in FLOAT32 + LOW if not any(place.startswith(start) for place in seen)]
    assert not unseen


def test_outputs_have_their_types(rehearsal):
    count = 0
    for name, case in rehearsal.items():
        for output, (dtype, _) in case["outputs"].items():
            kind = output.split()[0]
            assert dtype == OUTPUTS.get(kind, "float32"), (name, output)
            count += 1
    assert count > 300
