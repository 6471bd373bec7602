"""Ctrl-C during a training: noted, so that the step under way ends and the state is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupts:
    """Context in which the first Ctrl-C is only noted; the second ends the process at once."""

    def __init__(self) -> None:
        self.arrived = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.arrived and callable(self._before):
            self._before(number, frame)
        self.arrived = True
