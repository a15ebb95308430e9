"""Training the classifier whose features measure small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.data.examples import Batch, Examples
from nextscale.encoders.classifier import Classifier
from nextscale.training.engine.task import Task


class ClassifierTask(Task):
    """Cross-entropy of labels, on uint8 images that are moved by some pixels."""

    name = "classifier"

    def __init__(self, model: Classifier, examples: Examples, shift: int, label_smoothing: float):
        super().__init__()
        self.model, self.examples, self.trained = model, examples, model
        self.shift, self.smoothing = shift, label_smoothing

    def draw_noise(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"shift": torch.randint(2 * self.shift + 1, (count, 2), generator=rng)}

    def forward(self, batch: Batch, noise: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image_B3HW, label_B = batch["image"], batch["label"]
        if noise:
            image_B3HW = moved(image_B3HW, noise["shift"], self.shift)
        logits_BC = self.model.forward_once(image_B3HW)[1] if noise else self.model(image_B3HW).logits_BC
        loss = F.cross_entropy(logits_BC, label_B, label_smoothing=self.smoothing if noise else 0.0)
        return loss, {"accuracy": (logits_BC.detach().argmax(-1) == label_B).float().mean()}


def moved(image_B3HW: Tensor, shift_B2: Tensor, reach: int) -> Tensor:
    """Each image cut, at its own place (row, column) of 0 to 2 reach, from itself with a mirrored border of `reach`."""
    B, _, H, W = image_B3HW.shape
    rows_BH = _mirrored(shift_B2[:, :1] - reach + torch.arange(H, device=image_B3HW.device), H)
    columns_BW = _mirrored(shift_B2[:, 1:] - reach + torch.arange(W, device=image_B3HW.device), W)
    which_B = torch.arange(B, device=image_B3HW.device)
    return image_B3HW.permute(0, 2, 3, 1)[which_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]].permute(
        0, 3, 1, 2
    )


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Places outside 0 to size - 1 mirrored at the border, which is not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
