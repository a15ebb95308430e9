"""Which patch encoder a user means."""

from __future__ import annotations

from pathlib import Path

from nextscale.common.errors import UserError
from nextscale.common.files import is_hub_name
from nextscale.encoders import classifier, dino, moco_v3, self_supervised
from nextscale.encoders.patches import PatchEncoder

_WANTED = (
    f"{dino.WANTED}; {moco_v3.WANTED}; {self_supervised.WANTED}; "
    "or the folder of a classifier that `nextscale classifier train` wrote"
)


def load_encoder(source: str) -> PatchEncoder:
    """The frozen encoder of a file or folder, or DINO's by its name on the hub.

    A file is a checkpoint of MoCo v3; a folder holds DINOv2 or DINOv3 as transformers writes it, an encoder of
    `nextscale encoder train`, or a classifier. Raises UserError saying what is wanted when it is none of these.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (".pth", ".pt", ".tar", ".safetensors"):
        return moco_v3.load_moco_v3(path)
    if self_supervised.is_small_encoder(path):
        return self_supervised.load_small_encoder(path)
    if classifier.is_classifier(path):
        return classifier.ClassifierPatches(classifier.load_classifier(path))
    if not path.is_dir() and not is_hub_name(source):
        raise UserError(f"there is no encoder '{source}'; give {_WANTED}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{source} holds no encoder: it has no config.json; give {_WANTED}")
    return dino.load_dino(source)
