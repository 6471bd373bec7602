"""Waiting and threads of the asynchronous client; ``sync/io.py`` has the same names for the other one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread

Pause = Callable[[float], Awaitable[object]]
sleep = anyio.sleep
in_thread = anyio.to_thread.run_sync
