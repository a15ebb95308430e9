"""The reference of the metrics: statistics of a whole data set, and features of some of its images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.checkpoints.official_files import ZIP_ERRORS
from nextscale.common.errors import UserError
from nextscale.common.files import write_atomically
from nextscale.evaluation.metrics.frechet import Moments

_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set's features under one network."""

    where: str
    moments: dict[str, Moments]
    """Mean and covariance of "pool", and of "spatial" where the network has such features."""
    pool_MD: Tensor | None = None
    """Features of single images, for precision and recall."""
    network: str = ""
    fingerprint: str = ""
    """The network's name and fingerprint; empty where the file does not contain them."""
    images: int = 0
    """Number of images behind the statistics; 0 = unknown."""
    size: str = ""
    """Height x width of the images; empty where the file does not contain it."""
    made_of: str = ""
    """What the images are, as JSON, see `MeasuredImages.identity`; empty where the file does not contain it."""

    @classmethod
    def compute(cls, where: str, tensors: dict[str, Tensor], network: str = "", fingerprint: str = "") -> Reference:
        """The statistics of features named pool and, optionally, spatial."""
        moments = {kind: Moments.compute(tensors[kind], f"{where} ({kind})") for kind in _NAMES if kind in tensors}
        return cls(where, moments, tensors["pool"], network, fingerprint, len(tensors["pool"]))

    def save(self, path: Path, feature_images: int) -> None:
        """Write an .npz with ADM's names (mu, sigma, mu_s, sigma_s) and the features of evenly spaced images."""
        arrays: dict[str, Any] = {"network": self.network, "fingerprint": self.fingerprint, "images": self.images}
        arrays |= {"size": self.size, "made_of": self.made_of}
        for kind, moments in self.moments.items():
            mu, sigma = _NAMES[kind]
            arrays |= {mu: moments.mean_D.numpy(), sigma: moments.covariance_DD.numpy()}
        if self.pool_MD is not None:
            arrays["pool"] = self.pool_MD[choose_evenly(len(self.pool_MD), feature_images)].numpy()
        with write_atomically(path) as (draft,), draft.open("wb") as file:
            np.savez(file, **arrays)


def choose_evenly(count: int, chosen: int) -> Tensor:
    """`chosen` of `count` indices, evenly spaced; all of them when `chosen` is at least `count`.

    For features in the order of the images' contents, in which `evaluate` puts them: then it is a random part.
    """
    return torch.arange(min(chosen, count)) * count // max(1, min(chosen, count))


@dataclass(frozen=True)
class NpzFile:
    """An .npz file of statistics, features or samples."""

    path: Path
    names: tuple[str, ...]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """All arrays but arr_0, which may be large."""

    @property
    def has_statistics(self) -> bool:
        return {"mu", "sigma"} <= set(self.names)

    @property
    def has_features(self) -> bool:
        return "pool" in self.names

    @property
    def has_samples(self) -> bool:
        return "arr_0" in self.names

    @property
    def network(self) -> str:
        """The feature network; Inception where the file does not name it."""
        return self.read_text("network") or "inception"

    def features(self) -> dict[str, Tensor]:
        """Features of single images by kind."""
        return {n: torch.from_numpy(self.values[n]).float() for n in ("pool", "spatial", "logits") if n in self.names}

    def read_text(self, name: str) -> str:
        """A text of the file; "" where it has none of this name."""
        return str(self.values[name]) if name in self.names else ""

    def to_reference(self) -> Reference:
        """The file's statistics, and features of single images where it has them."""
        moments = {}
        for kind, (mu, sigma) in _NAMES.items():
            if mu in self.names and sigma in self.names:
                moments[kind] = _check_moments(self.path, self.values[mu], self.values[sigma])
        pool_MD = self.features()["pool"] if self.has_features else None
        count = int(self.values["images"]) if "images" in self.names else 0
        texts = {name: self.read_text(name) for name in ("network", "fingerprint", "size", "made_of")}
        return Reference(str(self.path), moments, pool_MD, images=count, **texts)


def _check_moments(path: Path, mu: np.ndarray, sigma: np.ndarray) -> Moments:
    mean_D = torch.from_numpy(np.atleast_1d(mu)).double()
    covariance_DD = torch.from_numpy(np.atleast_2d(sigma)).double()
    if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise UserError(f"{path}: mu and sigma must be (D) and (D, D); got {mu.shape} and {sigma.shape}")
    if not (mean_D.isfinite().all() and covariance_DD.isfinite().all()):
        raise UserError(f"{path}: mu or sigma is not finite")
    return Moments(mean_D, covariance_DD)


def read_npz(path: Path) -> NpzFile:
    """Open an .npz of statistics, features or samples; UserError when it is none of them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = tuple(file.files)
            values = {name: file[name] for name in names if name != "arr_0"}
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except ZIP_ERRORS as error:
        raise UserError(f"{path} is damaged or no .npz file: {error}") from error
    npz = NpzFile(path, names, values)
    if not (npz.has_statistics or npz.has_features or npz.has_samples):
        raise UserError(
            f"{path} holds {', '.join(names) or 'nothing'}; expected statistics (mu, sigma, mu_s, sigma_s), features "
            "(pool, spatial, logits) or samples (arr_0)"
        )
    return npz
