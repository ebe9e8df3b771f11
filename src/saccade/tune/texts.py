"""The text a run calibrates and measures on, in two halves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.models.text import calibration_text, heldout_text, read_text, split_text


@dataclass(frozen=True, eq=False)
class Texts:
    """Token ids of the two halves of the text, and the halves themselves."""

    calibration: str
    heldout: str
    calibration_ids: Tensor
    heldout_ids: Tensor
    source: str


def load_texts(tokenizer: Any, text: str | Path | None, context: int) -> Texts:
    """Both halves of the text, tokenised.

    Args:
        tokenizer: The model's.
        text: A UTF-8 file; None means the built-in text.
        context: Fewest tokens of a half.

    Returns:
        The halves and their token ids, int64 `[tokens]`.

    Raises:
        ValueError: If a half is shorter than the context.
    """
    if text is None:
        halves, source = (calibration_text(), heldout_text()), "built-in: documentation in CPython's pydoc_data.topics"
    else:
        halves, source = split_text(read_text(text)), str(text)
    ids = [torch.tensor(tokenizer(half, add_special_tokens=False).input_ids) for half in halves]
    for label, half in zip(("calibration", "held-out"), ids, strict=True):
        if len(half) < context:
            raise ValueError(f"text={source!r}: its {label} part has {len(half)} tokens, expected at least {context}")
    counts = f"{len(ids[0]):,} calibration and {len(ids[1]):,} held-out tokens"
    return Texts(halves[0], halves[1], ids[0], ids[1], f"{source}; {counts}")
