"""What is kept of keys and values, and what is read back."""

from saccade.mechanisms.cache.base import CachePolicy, Everything, compose
from saccade.mechanisms.cache.storage import Storage

__all__ = ["CachePolicy", "Everything", "Storage", "compose"]
