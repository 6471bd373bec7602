"""Queue for slow work, such as reading a recipe or hashing a model: in a worker thread, one at a time by caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class _Queue:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    length: int = 0  # including the request at work


class RecipeQueue:
    """A queue for each caller. A waiting request occupies no worker thread; AuthMiddleware limits their number."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    async def run(self, caller: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in a worker thread once the caller's earlier work is done."""
        queue = self._queues.setdefault(caller, _Queue())
        queue.length += 1
        try:
            async with queue.lock:
                return await run_in_threadpool(work, *args, **kwargs)
        finally:
            queue.length -= 1
            if not queue.length:
                del self._queues[caller]
