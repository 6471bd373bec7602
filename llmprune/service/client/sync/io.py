"""Waiting of the blocking client, by the names of ``aio/io.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Pause = Callable[[float], object]
sleep = time.sleep


def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do the work here: this client may block."""
    return work(*args, **kwargs)
