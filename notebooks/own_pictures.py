# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From a folder of pictures to a model
#
# This notebook trains a tokenizer and a transformer on pictures in folders, one folder for each class, and generates
# new ones. The pictures are scikit-learn's digits, so nothing is downloaded; put your own folders in their place.
#
# It needs `pip install 'nextscale[quickstart]'`. The same as commands: `docs/own-images.md`.

# %%
import os
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from nextscale import Pipeline
from nextscale.cli import main

SMALL = os.environ.get("NEXTSCALE_NOTEBOOK") == "small"  # as the tests run it, in seconds


def nextscale(line: str) -> None:
    """Run a command, as `nextscale ...` in a terminal."""
    assert main(line.split()) == 0, "the command says above what is wrong"


# %% [markdown]
# ## 1. Pictures in folders
#
# `pictures/eight/0008.png` is a picture of the class eight. The digits have 8x8 pixels and are enlarged here; nextscale
# refuses to train on pictures that are smaller than the model's.

# %%
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
digits = load_digits()
for i in range(80 if SMALL else len(digits.images)):
    folder = Path("pictures", names[digits.target[i]])
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((digits.images[i] * 255 / 16).astype("uint8"))
    picture.resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")

# %% [markdown]
# ## 2. The tokenizer
#
# It learns to turn a picture of 16x16 pixels into token maps of 1x1, 2x2, 3x3 and 4x4, and back. The recipe is that of
# CIFAR-10; options change it. Below each picture you see what is decoded from the first scales. The model can never be
# sharper than the last row.

# %%
small = "--train.batch-size 4 --tokenizer.base-channels 16 --tokenizer.vocab-size 32" if SMALL else ""
nextscale(
    "tokenizer train tokenizer-cifar10 --data pictures --image-size 16 --scales 1,2,3,4 --out runs/tokenizer "
    f"--train.steps {3 if SMALL else 800} --train.warmup-steps {1 if SMALL else 50} {small}"
)
Image.open("runs/tokenizer/reconstructions.png")

# %% [markdown]
# What a scale adds, and what is left for the next ones to encode:

# %%
nextscale("analyse pyramid runs/tokenizer pictures/eight --num 1 --out runs/pyramid")
Image.open("runs/pyramid/pyramid.png")

# %% [markdown]
# ## 3. The transformer
#
# The pictures become tokens once; the transformer then learns to predict the tokens of a scale from the coarser scales
# and the class. `curves.png` shows the loss of each scale. If the held-out loss rises, the model learns its pictures by
# heart: `runs/model/best` has the weights with the lowest one.

# %%
nextscale("tokenize pictures --tokenizer runs/tokenizer --out runs/cache --images.held-out 0.2")
small = "--train.batch-size 4 --transformer.depth 1 --transformer.width 32 --transformer.heads 2" if SMALL else ""
nextscale(
    "train cifar10 --data runs/cache --tokenizer runs/tokenizer --out runs/model --train.precision float32 "
    f"--train.steps {3 if SMALL else 400} --train.warmup-steps {1 if SMALL else 40} {small}"
)
Image.open("runs/model/curves.png")

# %% [markdown]
# ## 4. New pictures

# %%
pipeline = Pipeline.from_pretrained("runs/model")
pipeline.sample(names, cfg=1, top_k=0, top_p=0.95, seed=0)

# %% [markdown]
# The same eight, scale by scale: the coarse scales decide what it is, the fine ones add detail.

# %%
for step in pipeline.sample_scales(["eight"], cfg=1, top_k=0, top_p=0.95, seed=1):
    print(pipeline.config.pyramid.sides[step.k], step.tokens_BN.tolist()[0])

# %% [markdown]
# ## 5. What the model knows about a picture
#
# `score` is the log-likelihood of a picture's tokens for a class. The class with the largest one is the model's guess.

# %%
picture = sorted(Path("pictures", "eight").glob("*.png"))[0]
scores = [float(pipeline.score([str(picture)], labels=[name]).sum()) for name in names]
print(f"{picture} looks most like a {names[scores.index(max(scores))]}")

# %% [markdown]
# ## 6. Generate a part again
#
# The lower half of the picture is generated anew (black in the mask), the upper half stays.

# %%
mask = Image.new("L", (16, 16), 255)
mask.paste(0, (0, 8, 16, 16))
pipeline.edit(str(picture), mask, "three", seed=0)

# %% [markdown]
# Next: measure the model (`docs/measuring.md`), or make it cheaper (`half_compute.py`).
