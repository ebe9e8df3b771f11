"""Caches in files of the first version, which had padded tensors, no digest, and nothing that policies keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache.saving import CHANNELS, TOKENS

FIRST_VERSION = "1"
BESIDE = ("seen", *CHANNELS)
"""What was kept beside the parts of tokens, `[B, G, n, width]` each, and their "lengths"."""


def from_first(
    about: Any, layers: list[dict[str, Any]], tensors: dict[str, Tensor]
) -> tuple[Any, list[dict[str, Any]], dict[str, Tensor]]:
    """What a file of the second version would say; anything that cannot be raises, there or where it is read.

    Args:
        about: Of the file; lengths of layers, all the same, become one length.
        layers: As the file describes them.
        tensors: By name.

    Returns:
        The same three.
    """
    rows: dict[str, Tensor] = {}
    told = []
    for number, layer in enumerate(layers):
        form = {"kind": "pages", "storage": {"is": "Storage"} | layer["storage"], "stats": layer["stats"]}
        store = None if layer["empty"] else {"dtype": layer["dtype"], "dims": layer["dims"]}
        told.append({"form": form, "policy": None, "store": store, "derived": {}})
        mine = {name.removeprefix(f"{number}."): x for name, x in tensors.items() if name.startswith(f"{number}.")}
        if store is None:
            continue
        lengths = mine.pop("lengths")
        rows |= {f"{number}.{name}": mine.pop(name) for name in BESIDE if name in mine}
        longest = max((x.shape[2] for x in mine.values()), default=0)
        present = torch.arange(longest, device=lengths.device) < lengths[..., None]
        rows[f"{number}.{TOKENS}.lengths"] = lengths
        rows |= {f"{number}.{TOKENS}.{name}": x[present] for name, x in mine.items()}
    if isinstance(about, dict) and about.get("lengths"):
        about["length"] = max(about["lengths"])
    return about, told, rows


__all__ = ["FIRST_VERSION", "from_first"]
