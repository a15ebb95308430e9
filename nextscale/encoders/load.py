"""Loads the feature network or the encoder that a file, folder or hub name refers to."""

from __future__ import annotations

from pathlib import Path

from nextscale.common.errors import UserError
from nextscale.common.reading import is_hub_name, read_json
from nextscale.encoders import dino, inception, moco_v3, pixels, self_supervised
from nextscale.encoders.classifier import ClassifierEncoder, is_classifier, load_classifier
from nextscale.encoders.network import FeatureNetwork
from nextscale.encoders.patches import PatchEncoder

_ENCODERS = (
    f"{dino.EXPECTED}; {moco_v3.EXPECTED}; {self_supervised.EXPECTED}; "
    "the folder of a classifier that `nextscale classifier train` wrote; or `pixels` for the pixels of each cell"
)


def load_feature_network(source: str) -> FeatureNetwork:
    """The feature network of a file (Inception's ported weights, .pth or .safetensors), a folder (a classifier of
    `nextscale classifier train`, or DINOv2, whose feature is the class token), or DINOv2's name on the hub.

    Raises UserError when there is none, or when it is another network.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (".pth", ".pt", ".safetensors"):
        return inception.Inception.from_file(path)
    _check_config(path)
    if is_classifier(path):
        return load_classifier(path)
    if path.is_dir() and not (path / "config.json").is_file():
        try:
            return inception.Inception.from_file(path)
        except UserError as error:
            raise UserError(f"{source} holds no feature network: it has no config.json, and {error}") from error
    if not path.exists() and "/" not in source:
        raise UserError(
            f"there is no feature network {source}; give {inception.FILE}, the folder of a classifier that `nextscale "
            "classifier train` wrote, or the folder or hub name of DINOv2"
        )
    return dino.DinoFeatureNetwork(dino.load_dino(source))


def load_encoder(source: str) -> PatchEncoder:
    """The frozen encoder of a file (MoCo v3's checkpoint), a folder (DINOv2 or DINOv3 as transformers writes it, an
    encoder of `nextscale encoder train`, or a classifier), or DINO's name on the hub; `pixels` needs no file.

    Raises UserError naming what is expected when it is none of these.
    """
    path = Path(source)
    if source == pixels.NAME and not path.exists():
        return pixels.PixelEncoder()
    if path.is_file() or path.suffix in (".pth", ".pt", ".tar", ".safetensors"):
        return moco_v3.load_moco_v3(path)
    _check_config(path)
    if self_supervised.is_small_encoder(path):
        return self_supervised.load_small_encoder(path)
    if is_classifier(path):
        return ClassifierEncoder(load_classifier(path))
    if not path.is_dir() and not is_hub_name(source):
        raise UserError(f"there is no encoder '{source}'; give {_ENCODERS}")
    if path.is_dir() and not (path / "config.json").is_file():
        try:
            return moco_v3.load_moco_v3(path)
        except UserError as error:
            raise UserError(
                f"{source} holds no encoder: it has no config.json, and {error}; give {_ENCODERS}"
            ) from error
    return dino.load_dino(source)


def _check_config(folder: Path) -> None:
    """Raise UserError when the folder has a config.json that is damaged: it could be of any network."""
    if (folder / "config.json").is_file():
        read_json(folder / "config.json", finite=False)
