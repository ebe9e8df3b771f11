"""See `api`."""

from saccade.ops.long_conv.api import long_conv

__all__ = ["long_conv"]
