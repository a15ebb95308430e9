"""The interface of feature networks: frozen networks that give one vector for each 8-bit image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of a batch, float32."""

    pool_BD: Tensor
    """One vector for each image."""
    spatial_BS: Tensor | None = None
    """A flattened feature map."""
    logits_BC: Tensor | None = None
    """Class logits."""

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors that the network has, by name: pool, spatial, logits."""
        named = {"pool": self.pool_BD, "spatial": self.spatial_BS, "logits": self.logits_BC}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class FeatureNetwork(Protocol):
    """A frozen network. The metrics computed from its features carry its name."""

    @property
    def name(self) -> str:
        """inception, dinov2, or classifier."""

    def __call__(self, image_B3HW: Tensor) -> Features:
        """Features of uint8 images of any size."""

    def fingerprint(self) -> str:
        """A checksum of the weights. Features of different weights must not be compared."""
