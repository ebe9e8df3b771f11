"""Saccade: every efficient-attention mechanism on the same few engines.

Names that need transformers or a report library are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from saccade.catalog import Card, cards, get, register, search
from saccade.mechanisms.cache.tiers import Disk, Host
from saccade.mechanisms.compose import Attention
from saccade.ops import attend, block_attend, decode_attend, gather_attend, long_conv, merge, recording, scan
from saccade.types import AttentionOutput, BlockLayout, Geometry, Kind, KVPages, Pattern, TokenIndex

if TYPE_CHECKING:
    from saccade.bench import compare
    from saccade.laws import verify
    from saccade.plug import PagedCache, Recipe, apply, explain
    from saccade.tune import tune

__version__ = "0.1.0"

_LATER = {
    "PagedCache": "saccade.plug",
    "Recipe": "saccade.plug",
    "apply": "saccade.plug",
    "compare": "saccade.bench",
    "explain": "saccade.plug",
    "tune": "saccade.tune",
    "verify": "saccade.laws",
}

__all__ = [
    "Attention", "AttentionOutput", "BlockLayout", "Card", "Disk", "Geometry", "Host", "KVPages", "Kind",
    "PagedCache", "Pattern", "Recipe", "TokenIndex", "apply", "attend", "block_attend", "cards", "compare",
    "decode_attend", "explain", "gather_attend", "get", "long_conv", "merge", "recording", "register", "scan",
    "search", "tune", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a name that needs more than torch, or raise `AttributeError`."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'saccade' has no attribute {name!r}")
