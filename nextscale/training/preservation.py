"""Prior preservation: adapters are trained on samples of the model beside the new images, so that it keeps its classes.

The method of DreamBooth (arXiv 2208.12242). Half of each batch are images of the data, the other half samples that the
model drew before its training, of all its classes and of "no label", without guidance and filters. They are stored with
the run, which resumes with the same ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextscale.checkpoints import Checkpoint
from nextscale.common.devices import copy_to
from nextscale.common.distributed import World
from nextscale.common.files import write_atomically
from nextscale.common.rng import make_generator
from nextscale.config.sampling import SampleConfig
from nextscale.data.examples import Batch, Examples, MemoryExamples
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.inputs import read_tokens

FILE = "model-samples.safetensors"
_BATCH, _UNLABELLED, _VIEWS = 64, 8, 4


class PreservingExamples(MemoryExamples):
    """Tokens of the data and of the model's samples, one of each in turn."""

    def __init__(self, data: dict[str, Tensor], samples: dict[str, Tensor]):
        super().__init__(**{name: torch.cat([data[name], samples[name]]) for name in data})
        self.data, self.samples = len(data["label"]), len(samples["label"])

    def __len__(self) -> int:
        return 2 * self.data

    def order(self, rng: torch.Generator) -> Tensor:
        """An epoch has each example of the data once, and as many samples, drawn again where there are fewer."""
        turns = [torch.randperm(self.samples, generator=rng) for _ in range(-(-self.data // self.samples))]
        chosen = torch.cat(turns)[: self.data] + self.data
        return torch.stack([torch.randperm(self.data, generator=rng), chosen], dim=1).flatten()


def add_model_samples(
    examples: Examples, start: Checkpoint, tokenizer: Tokenizer, count: int, new_classes: int, seed: int, folder: Path,
    world: World, *, views: bool,
) -> PreservingExamples:  # fmt: skip
    """The examples as tokens, mixed with `count` samples of the model `start`, which are stored in `folder`.

    `new_classes`: those that the trained model has more. `views`: whether images are cropped or mirrored at random;
    each is then encoded four times. All processes must call it.
    """
    path = folder / FILE
    if world.main and not path.exists():
        print(f"drawing {count} samples of the model itself, to keep its classes (lora.keep)", flush=True)
        samples = _draw(start, count, new_classes, seed, world)
        with write_atomically(path) as (draft,):
            save_file(samples, draft)
    world.wait()
    data = _encode(examples, tokenizer, _VIEWS if views else 1, world)
    mixed = PreservingExamples(data, load_file(path))
    mixed.inputs, mixed.skipped = examples.inputs, examples.skipped
    return mixed


def _draw(start: Checkpoint, count: int, new_classes: int, seed: int, world: World) -> dict[str, Tensor]:
    """Tokens (count, L) and labels of samples, every eighth without a label."""
    pipeline = Pipeline.from_checkpoint(start, device=world.device, dtype=torch.float32)
    classes = pipeline.transformer.config.condition.num_classes
    rng = make_generator(seed, "kept classes")
    order = torch.cat([torch.randperm(classes, generator=rng) for _ in range(-(-count // classes))]).tolist()
    labels = [None if i % _UNLABELLED == 0 else label for i, label in enumerate(order[:count])]
    settings = SampleConfig(cfg=0.0, top_k=0, top_p=0.0, seed=seed)
    tokens_BL = pipeline.sample(labels, settings, batch_size=_BATCH, progress=True).tokens
    label_B = torch.tensor([classes + new_classes if label is None else label for label in labels])
    return {"tokens": tokens_BL.contiguous(), "label": label_B}


@torch.no_grad()
def _encode(examples: Examples, tokenizer: Tokenizer, views: int, world: World) -> dict[str, Tensor]:
    """Tokens and labels of all examples, each `views` times."""
    tokens, labels, count = list[Tensor](), list[Tensor](), len(examples)
    for first in (view * count + i for view in range(views) for i in range(0, count, _BATCH)):
        rows = range(first % count, min(first % count + _BATCH, count))
        batch = examples.fetch(rows, range(first, first + len(rows)))
        on_device: Batch = {n: copy_to(batch[n], world.device) for n in ("tokens", "image") if n in batch}
        tokens.append(read_tokens(on_device, tokenizer).cpu())
        labels.append(batch["label"])
    return {"tokens": torch.cat(tokens), "label": torch.cat(labels)}
