"""Memory that was let go, handed back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Hand free heap memory back: glibc keeps freed blocks below 32 MB, so that layers of such tensors pile up."""
    give_back = _malloc_trim()
    if give_back is not None:
        give_back(0)
