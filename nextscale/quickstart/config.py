"""Settings of the quickstart. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.config import SampleConfig, TokenizerConfig, TransformerConfig
from nextscale.errors import UserError
from nextscale.pyramid import Pyramid
from nextscale.train.config import TrainConfig
from nextscale.train.tokenizer_config import derive_pyramid


def _tokenizer() -> TokenizerConfig:
    return TokenizerConfig(
        vocab_size=128,
        code_width=8,
        base_channels=32,
        channel_multipliers=(1, 1, 2),
        res_blocks=1,
        attention=False,
    )


@dataclass(frozen=True)
class QuickstartConfig:
    """Train a small tokenizer and a small class-conditional model on one machine, sample, and measure.

    The defaults are sized for the bundled digits and two CPU cores.
    """

    data: str = "digits"
    """'digits' (scikit-learn's, no download), a folder of images or of class sub-folders, or a .parquet file with
    columns image and label."""
    image_size: int = 0
    """Side of the square images in pixels; 0 means 16 for the digits and 32 for others."""
    scales: str = ""
    """Sides of the token maps, coarse to fine, such as 1,2,3,4; empty derives them from the image size."""
    limit: int = 20000
    """Use at most this many images of a larger set, chosen at random."""
    held_out: float = 0.2
    """Share of the images kept from training, to measure with."""
    seed: int = 0
    tokenizer: TokenizerConfig = field(default_factory=_tokenizer)
    transformer: TransformerConfig = field(default_factory=lambda: TransformerConfig(depth=4, width=192, heads=6))
    """The number of classes is taken from the data."""
    train_tokenizer: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=800, batch_size=32, learning_rate=2e-3, save_every=100)
    )
    train_transformer: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=400, learning_rate=1e-3, weight_decay=0.1, drop_path=0.2, save_every=100
        )
    )
    sampling: SampleConfig = field(default_factory=lambda: SampleConfig(cfg=1.0, top_k=0, top_p=0.95))
    measure_images: int = 2000
    """Generated images that the second classifier is fitted on; the first one reads up to 500 of them."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise UserError(f"quickstart: held_out must lie between 0 and 1; got {self.held_out}")
        if self.limit < 1 or self.measure_images < 1:
            raise UserError("quickstart: limit and measure_images must be at least 1")

    def geometry(self) -> tuple[int, Pyramid]:
        """Image size in pixels, and the pyramid."""
        size = self.image_size or (16 if self.data == "digits" else 32)
        return size, derive_pyramid(size, self.tokenizer.downsampling, self.scales)
