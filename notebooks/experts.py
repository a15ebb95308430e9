# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # What experts do
#
# This notebook trains a small mixture of experts (MEPA) and looks at which expert works where: for each scale, each
# position, and each token of one picture. The idea is explained in `docs/routing.md`.
#
# It needs `pip install 'nextscale[quickstart]'`; nothing is downloaded.

# %%
import os

import torch
from PIL import Image

from nextscale import Pipeline
from nextscale.cli import main
from nextscale.transformer.feed_forward import collect

SMALL = os.environ.get("NEXTSCALE_NOTEBOOK") == "small"  # as the tests run it, in seconds


def nextscale(line: str) -> None:
    """Run a command, as `nextscale ...` in a terminal."""
    assert main(line.split()) == 0, "the command says above what is wrong"


# %% [markdown]
# ## 1. A model with experts
#
# `nextscale quickstart` trains one on scikit-learn's digits: in each of its four blocks there are eight feed-forward
# networks, and a router selects three of them for each token, knowing the token's scale.

# %%
small = (
    "--limit 60 --image-size 8 --scales 1,2,4 --tokenizer.channel-multipliers 1 1 "
    "--tokenizer.vocab-size 16 --train-tokenizer.steps 2 --train-tokenizer.batch-size 4 --train-transformer.steps 2 "
    "--train-transformer.batch-size 4 --transformer.depth 2 --transformer.width 32 --transformer.heads 2 "
    "--loss.encoder= --measure-images 10"
)
nextscale(f"quickstart --out runs/experts {small if SMALL else ''}")
Image.open("runs/experts/samples.png")

# %% [markdown]
# ## 2. How much each expert works
#
# The load of an expert is the share of the tokens that select it. The load-balance loss keeps it even over all scales;
# within a scale it need not be. Rows of the map below are scales, columns are experts.

# %%
few = "--images.limit 60 --num 6" if SMALL else "--num 200"
nextscale(f"analyse load runs/experts --data digits --out runs/load {few}")
Image.open("runs/load/load.png")

# %% [markdown]
# ## 3. Where each expert works
#
# For each position of a scale, the share of the pictures that select an expert. Bright squares are positions where
# nearly every picture selects it: experts divide a map among themselves.

# %%
nextscale(f"analyse routing runs/experts --data digits --out runs/routing {few}")
Image.open("runs/routing/routing.png")

# %% [markdown]
# One picture, next to what is decoded from its scales so far:

# %%
nextscale(f"analyse routing runs/experts --data digits --image 0 --out runs/one {few}")
Image.open("runs/one/routing.png")

# %% [markdown]
# ## 4. The same in Python
#
# Every pass returns what its routers decided. Here a picture is sampled, and its tokens are given to the model again,
# all scales at once; `selected_BNM` says which token selected which expert, and `gates_BNM` by which factor the output
# of the expert is multiplied. Each line below is the share of a scale's tokens that selected each of the experts.

# %%
pipeline = Pipeline.from_pretrained("runs/experts", dtype="float32")
images = pipeline.sample([3], cfg=1, top_k=0, top_p=0.95)
with torch.no_grad():
    inputs = pipeline.tokenizer.teacher_inputs(images.tokens)
    output = pipeline.transformer(torch.tensor([3]), inputs)
for block, routing in enumerate(collect(output.records, "routing"), start=1):
    for (start, end), side in zip(pipeline.config.pyramid.spans, pipeline.config.pyramid.sides, strict=True):
        share = routing.selected_BNM[0, start:end].float().mean(dim=0)
        print(f"block {block}, scale {side}: " + " ".join(f"{value:4.0%}" for value in share.tolist()))

# %% [markdown]
# ## 5. Do the experts matter?
#
# If the router's scores are exchanged between experts, tokens go to the wrong ones, and the model predicts the tokens
# of the picture worse: the loss rises by how much the experts differ.

# %%
tokens = images.tokens
labels = torch.tensor([3])


def compute_loss() -> float:
    """Mean nats per token."""
    with torch.no_grad():
        logits = pipeline.transformer(labels, pipeline.tokenizer.teacher_inputs(tokens)).logits_BNV
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))


before = compute_loss()
routers = [block.ffn.router for block in pipeline.transformer.blocks]
with torch.no_grad():
    for router in routers:
        router.score.weight.copy_(router.score.weight.roll(1, dims=0))
print(f"with its own experts {before:.3f} nats per token, with the next ones {compute_loss():.3f}")

# %% [markdown]
# Next: write a router of your own (`docs/extending.md`), or compare the four that exist (`docs/routing.md`).
