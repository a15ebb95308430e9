# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From a trained model to half the compute
#
# This notebook takes a trained model and halves the arithmetic of its transformer, in two ways together: dynamic
# experts, where each token runs only what it needs, and guidance that ends before the last scales. It counts what is
# executed and shows the pictures of both. The ideas are explained in `docs/dynamic.md` and `docs/guidance.md`.
#
# It needs `pip install 'nextscale[quickstart]'` and the folder `models/` of the repository.

# %%
import os
from pathlib import Path

from nextscale import Pipeline, SampleConfig
from nextscale.cli import main
from nextscale.evaluation.flops import count_dense_flops, count_sampled_flops

SMALL = os.environ.get("NEXTSCALE_NOTEBOOK") == "small"  # as the tests run it, in seconds
MODEL = next(path for path in ("models/var-cifar10", "../models/var-cifar10") if Path(path).exists())


def nextscale(line: str) -> None:
    """Run a command, as `nextscale ...` in a terminal."""
    assert main(line.split()) == 0, "the command says above what is wrong"


# %% [markdown]
# ## 1. Dynamic experts
#
# `sparsify` tunes the model so that most hidden units are 0, divides those of each block into 24 experts of 32, trains
# routers that predict how large each expert's output is, and finds thresholds for shares of the FLOPs. Here it works on
# samples of the model itself; `--data cache` gives it training images.

# %%
training = f"--tuning.epochs 0 --routers.epochs 0 --hoyer 3e-4 --expert-size {192 if SMALL else 32} --router-width 64"
steps = (
    "--samples 20 --tuning.steps 1 --routers.steps 1 --tuning.batch-size 4 --routers.batch-size 4 "
    "--calibration-images 2 --budgets 0.8"
    if SMALL
    else "--samples 2000 --tuning.steps 60 --routers.steps 200 --tuning.batch-size 64 --routers.batch-size 64 "
    "--routers.learning-rate 3e-3 --tuning.learning-rate 3e-4"
)
nextscale(f"sparsify {MODEL} --out runs/dynamic {training} {steps} --sampling.top-k 0 --sampling.top-p 0.95")

# %% [markdown]
# ## 2. Count what is executed
#
# Guidance needs two passes for each picture. When it ends after four of the six scales, the last two, which have 100 of
# the 130 tokens, take one. A larger strength at the guided scales makes up for it (`docs/tune.md` has the measurement).

# %%
dense, dynamic = Pipeline.from_pretrained(MODEL), Pipeline.from_pretrained("runs/dynamic")
common = {"top_k": 0, "top_p": 0.95, "seed": 1}
cases = {
    "dense": (dense, SampleConfig(cfg=2, **common)),
    "dynamic experts, 80 %": (dynamic, SampleConfig(cfg=2, budget=0.8, **common)),
    "guidance of four scales": (dense, SampleConfig(cfg=8, cfg_scales=4, **common)),
    "both": (dynamic, SampleConfig(cfg=8, cfg_scales=4, budget=0.8, **common)),
}
labels = [label % 10 for label in range(2 if SMALL else 20)]
whole = count_dense_flops(dense.config, cases["dense"][1])
for name, (pipeline, settings) in cases.items():
    executed = count_sampled_flops(pipeline, labels, settings)
    print(f"{name:26} {executed.flops / 1e9:.2f} GFLOP an image, {executed.flops / whole:.0%} of the dense model's")

# %% [markdown]
# ## 3. Look at the pictures
#
# Equal seeds and labels. The dense model:

# %%
dense.sample(labels, cases["dense"][1])

# %% [markdown]
# Half the arithmetic:

# %%
dynamic.sample(labels, cases["both"][1])

# %% [markdown]
# ## 4. Measure before you believe it
#
# Pictures of a few seeds prove nothing, and FLOPs are not time. These commands measure both; they need CIFAR-10's test
# images and take longer:
#
# ```sh
# nextscale evaluate runs/dynamic --features models/classifier-cifar10 --reference cifar10-test.parquet --num 2000 \
#     --cfg 8 --cfg-scales 4 --budget 0.8 --top-k 0 --top-p 0.95 --out report.json
# nextscale bench runs/dynamic --against models/var-cifar10 --batch-sizes 8
# ```
#
# `nextscale tune` searches such settings on your machine, within a loss that you choose.
