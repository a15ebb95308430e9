"""What a model makes of a given picture, teacher-forced: tokens, certainty and hits of each scale, and its experts.

Letters: L tokens of all scales, V codes, M experts, h w sides of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image, ImageChops
from torch import Tensor

from nextscale.common.pictures import to_pil
from nextscale.data.arrays import load_batch
from nextscale.demo.models import Asked, Model
from nextscale.evaluation.metrics.reconstruction import psnr
from nextscale.pyramid import Pyramid
from nextscale.research.analysis.analyzed_model import name_experts, name_scales
from nextscale.sampling.sampler import check_finite_logits
from nextscale.transformer.feed_forward import collect
from nextscale.transformer.feed_forward.balance import normalise_load

Map = list[list[float]]
"""h rows of w values."""


@dataclass(frozen=True)
class ScaleView:
    """One scale of the picture."""

    name: str
    picture: Image.Image
    """Reconstructed from the tokens up to this scale."""
    added: Image.Image
    """What this scale adds: half the difference to the scale before, around grey; of the first one the picture."""
    psnr: float
    """Of the reconstruction, in dB."""
    tokens: Map
    """The tokens as shares of the number of codes."""
    entropy: Map
    """Of the model's prediction at each position, in nats."""
    right: Map
    """1 where the code that the model finds most likely is the picture's, else 0."""
    probability: float
    """Of the picture's tokens, their geometric mean."""

    @property
    def mean_entropy(self) -> float:
        return average_map(self.entropy)

    @property
    def accuracy(self) -> float:
        """The share of positions that are right."""
        return average_map(self.right)


@dataclass(frozen=True, eq=False)
class InsideView:
    """A picture as the model sees it."""

    picture: Image.Image
    """The picture in the model's size."""
    scales: list[ScaleView]
    experts: list[str]
    """Names of the experts of a mixture; empty for other models."""
    routing: list[list[list[Map]]]
    """[block][scale][expert]: 1 where the expert worked, else 0; empty for other models."""

    def compute_load(self, block: int) -> list[list[float]]:
        """[scale][expert]: which share of a scale's work went to each expert in this block, counted from 0.

        After the scales a last row: of the work of all of them."""
        counts = torch.tensor([[sum(map(sum, values)) for values in experts] for experts in self.routing[block]])
        return normalise_load(torch.cat([counts, counts.sum(dim=0, keepdim=True)]), 1.0).tolist()


@torch.no_grad()
def look_inside(model: Model, picture: Image.Image, asked: Asked) -> InsideView:
    """Encode a picture (of any size, cropped to the model's) and predict each scale from the true ones before it.

    `asked`: the class or the text that the model is told.
    """
    pipeline = model.pipeline
    tokenizer, transformer, pyramid = pipeline.tokenizer, pipeline.transformer, pipeline.config.pyramid
    image_13HW, _ = load_batch(picture, pipeline.config.image_size)
    tokens_1L = pipeline.encode(picture).to(pipeline.device)
    output = transformer(model.read_condition(asked), tokenizer.teacher_inputs(tokens_1L))
    check_finite_logits(output.logits_BNV.isfinite().all())
    log_LV = output.logits_BNV[0].log_softmax(dim=-1)
    entropy_L = -(log_LV.exp() * log_LV).sum(dim=-1)
    right_L = log_LV.argmax(dim=-1) == tokens_1L[0]
    nats_L = -log_LV.gather(-1, tokens_1L.T).squeeze(-1)
    images = [(tokenizer.decode_canvas(canvas) + 1) / 2 for canvas in tokenizer.build_canvases(tokens_1L)]
    pictures = [to_pil(image)[0] for image in images]
    added = [pictures[0], *(_subtract(after, before) for before, after in pairwise(pictures))]
    true = (image_13HW + 1) / 2
    maps = [_split(t, pyramid) for t in (tokens_1L[0] / pipeline.config.tokenizer.vocab_size, entropy_L, right_L)]
    scales = [
        ScaleView(
            name, pictures[k], added[k], float(psnr(images[k].cpu(), true)), maps[0][k], maps[1][k], maps[2][k],
            float((-nats_L[slice(*pyramid.spans[k])].mean()).exp()),
        )
        for k, name in enumerate(name_scales(pyramid))
    ]  # fmt: skip
    routing = [_split_experts(routing.selected_BNM[0], pyramid) for routing in collect(output.records, "routing")]
    experts = name_experts(transformer.config.experts) if routing else []
    return InsideView(to_pil(true)[0], scales, experts, routing)


def _split(values_L: Tensor, pyramid: Pyramid) -> list[Map]:
    """The values of all positions as a map for each scale."""
    sides = zip(pyramid.spans, pyramid.sides, strict=True)
    return [values_L[start:end].float().view(side).tolist() for (start, end), side in sides]


def _split_experts(selected_LM: Tensor, pyramid: Pyramid) -> list[list[Map]]:
    """[scale][expert] a map."""
    experts = [_split(selected_L, pyramid) for selected_L in selected_LM.T]
    return [list(scale) for scale in zip(*experts, strict=True)]


def _subtract(after: Image.Image, before: Image.Image) -> Image.Image:
    """Half the difference of two pictures around grey."""
    return ImageChops.subtract(after, before, scale=2, offset=128)


def average_map(values: Map) -> float:
    """The mean of a map's values."""
    return sum(map(sum, values)) / sum(map(len, values))
