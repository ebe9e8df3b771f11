"""See `api`."""

from saccade.ops.gather_attend.api import gather_attend

__all__ = ["gather_attend"]
