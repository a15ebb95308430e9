"""Settings of `nextscale evaluate`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.common.sizes import Size
from nextscale.config.data import ReadConfig
from nextscale.config.sampling import Capture, SampleConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """Which images are measured, and how."""

    count: int = 0
    """Images, of a data set drawn from all classes; 0 = all of a data set, 50,000 of a model."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How a model samples."""
    size: Size = 0
    """Resize and crop to this size, the side of squares or (height, width); 0 = leave images as they are (those of
    several sizes get one, see `nextscale.evaluation.sizes`), resize references to the size of the images."""
    split: int = 5000
    """Images of one split of the Inception Score. Splits are of images in an order of their contents."""
    neighbours: int = 3
    """k of precision and recall."""
    references: int = 10_000
    """Reference images for precision and recall, drawn from all by their contents."""
    shard: int = 1000
    """Images of one file of features. An interrupted run continues with the first missing file."""
    images: ReadConfig = field(default_factory=ReadConfig)
    """How data sets are read."""
    batch: int = 50
    """Batch size. Metrics do not depend on it beyond rounding."""
    decode_batch: int = 0
    """How many samples of a batch are decoded at once; 0 = as many as fit into a GPU's memory."""
    dtype: str = "auto"
    """Type that a model computes in; auto = the fastest that is right for the device and the model."""
    capture: Capture = "auto"
    """Whether a model samples by captured CUDA graphs."""
    reconstruct: str = ""
    """Images that the model's tokenizer encodes and decodes; the reconstructions are measured instead of samples."""
    lora: tuple[str, ...] = ()
    """Adapters that are added to the weights of the measured model, as `Pipeline.load_lora` takes them."""
    scales: str = ""
    """Sides of the token maps that the measured model samples at; empty = its own."""
