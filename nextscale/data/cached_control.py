"""Control pictures in the shards of a token cache, computed from the images that were encoded.

A shard of a cache with control pictures holds, besides its tokens, of each view

    edges            uint8 (n, views, H, W / 8 rounded up)    eight pixels in a byte, the first in its highest bit
    low-resolution   uint8 (n, views, 3, h, w)                before it is enlarged to the size of the image
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nextscale.checkpoints.shards import Form
from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.data.cache_head import ControlHead
from nextscale.data.examples import Batch
from nextscale.transformer.conditions.picture import LOW_RESOLUTION, compute_control, enlarge, reduce_resolution


def list_control_forms(head: ControlHead | None, rows: int, views: int) -> dict[str, Form]:
    """Dtype and shape of the tensors above, of a shard with so many images."""
    if head is None:
        return {}
    height, width = head.size
    shapes = {
        "edges": (height, -(-width // 8)),
        "low-resolution": (3, -(-height // LOW_RESOLUTION), -(-width // LOW_RESOLUTION)),
    }
    return {kind: ([torch.uint8], (rows, views, *shapes[kind])) for kind in head.kinds}


def pack_control(image_B3HW: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The tensors above, without the dimension of the views, of images uint8 (B, 3, H, W)."""
    packed: dict[str, Tensor] = {}
    for kind in kinds:
        if kind == "edges":
            edges_BHW = compute_control(image_B3HW, kind)[:, 0].cpu().numpy()
            packed[kind] = torch.from_numpy(np.packbits(edges_BHW > 0, axis=-1))
        else:
            packed[kind] = reduce_resolution(image_B3HW)
    return packed


def unpack_control(batch: Batch, head: ControlHead | None) -> dict[str, Tensor]:
    """The control pictures, uint8 (B, C, H, W), of a batch of the tensors above: as `compute_control` gives them."""
    if head is None:
        return {}
    height, width = head.size
    pictures: dict[str, Tensor] = {}
    for kind in head.kinds:
        if kind == "edges":
            bits_BHW = np.unpackbits(batch[kind].numpy(), axis=-1, count=width)
            pictures[kind] = torch.from_numpy(bits_BHW * np.uint8(255))[:, None]
        else:
            pictures[kind] = enlarge(batch[kind], (height, width))
    return pictures


def check_control(condition: ConditionConfig, head: ControlHead | None, where: str) -> None:
    """UserError when a condition reads control pictures that the token cache `where` does not hold."""
    stored = head.kinds if head else ()
    missing = [p.control for p in condition.list_parts().values() if p.control and p.batch_field == p.control]
    missing = [kind for kind in missing if kind not in stored]
    if missing:
        raise UserError(
            f"{where} is a token cache without {' and '.join(missing)}, which the model reads: make it again with "
            f"`nextscale tokenize --control {' '.join((*stored, *missing))}`, or train on the images"
        )
