"""Which feature network a user means."""

from __future__ import annotations

from pathlib import Path

from nextscale.common.errors import UserError
from nextscale.encoders.classifier import is_classifier, load_classifier
from nextscale.encoders.dino import ClassToken, load_dino
from nextscale.encoders.inception import FILE, Inception
from nextscale.encoders.network import FeatureNetwork


def load_network(source: str) -> FeatureNetwork:
    """The network of a file or folder: Inception's ported weights (.pth or .safetensors), the folder of a classifier of
    ours, or of an encoder (DINOv2, by its class token), or an encoder's name on the hub.

    Raises UserError when there is none, or it is of another kind.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (".pth", ".pt", ".safetensors"):
        return Inception.from_file(path)
    if is_classifier(path):
        return load_classifier(path)
    if not path.exists() and "/" not in source:
        raise UserError(
            f"there is no feature network {source}; give {FILE}, the folder of a classifier that `nextscale "
            "classifier train` wrote, or the folder or hub name of DINOv2"
        )
    return ClassToken(load_dino(source))
