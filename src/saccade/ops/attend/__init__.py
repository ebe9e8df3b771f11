"""See `api`."""

from saccade.ops.attend.api import attend

__all__ = ["attend"]
