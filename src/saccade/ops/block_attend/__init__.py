"""See `api`."""

from saccade.ops.block_attend.api import block_attend

__all__ = ["block_attend"]
