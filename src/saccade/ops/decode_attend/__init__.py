"""See `api`."""

from saccade.ops.decode_attend.api import decode_attend

__all__ = ["decode_attend"]
