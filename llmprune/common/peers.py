"""Rendezvous of the processes of a run, with detection of dead and diverging processes.

torch's collectives wait forever for a missing process, and mix up values that do not belong together. So before each
exchange the processes publish their next step in a key-value store, and continue when all have published the same. A
thread of each process increments its heartbeat key: a process whose heartbeat stops is dead, and a process that ends
by an error leaves its message in the store.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from llmprune.common.errors import PeerError, to_continue

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

# Seconds.
_HEARTBEAT = 2.0
_SILENCE = 180.0  # without a heartbeat, after which a process counts as dead
_GRACE = 60.0  # until this process is killed after another has failed
_LINGER = 10.0  # until all have read this process's message or have ended themselves
_LONGEST_PAUSE = 0.05


class Peers:
    """Connection of this process to the others of its run. ``connect`` opens a store for each thread."""

    def __init__(self, connect: Callable[[], Store], *, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.failure: str | None = None  # message of another process that failed
        self._store = connect()
        self._steps = 0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(connect(),), name="peers", daemon=True)
        self._watcher.start()

    def meet(self, step: str, value: str = "") -> None:
        """Wait until every process is at ``step`` with the same ``value``.

        Raises PeerError where a process has failed, is at another step or has another value.
        """
        number, self._steps = self._steps, self._steps + 1
        own = f"{step}\n{value}"
        with suppress(RuntimeError):  # the watcher reports a store that is gone
            self._store.set(f"{number}/{self.rank}", own)
        for other in range(self.count):
            if other != self.rank:
                self._compare(other, own, theirs=self._read(f"{number}/{other}"))
        if number > 1:  # all processes are at the next step, so they have read it
            with suppress(RuntimeError):
                self._store.delete_key(f"{number - 2}/{self.rank}")

    def fail(self, message: str) -> list[int]:
        """Publish why this process ends; return the processes that did not read it in time, which are gone."""
        gone: list[int] = []
        with suppress(RuntimeError):  # the process with the store is gone
            if not self._store.check(["failed"]):
                self._store.set("failed", f"{self.rank}\n{message}")
            gone = self._linger("read")
        self._ended.set()
        return gone

    def end(self) -> None:
        """Wait until all processes have ended; the process with the store ends last."""
        self.meet("end")
        self._ended.set()
        with suppress(RuntimeError):
            self._linger("left")

    def _linger(self, mark: str) -> list[int]:
        """Set a mark; return the processes that have not set it within ``_LINGER`` seconds."""
        self._store.set(f"{mark}/{self.rank}", "")
        until = time.monotonic() + _LINGER
        missing = [other for other in range(self.count) if other != self.rank]
        while missing and time.monotonic() < until:
            time.sleep(0.02)
            missing = [other for other in missing if not self._store.check([f"{mark}/{other}"])]
        return missing

    def _read(self, key: str) -> str:
        pause = 0.0002  # polling: the store's own wait logs a warning at every time-out
        while True:
            with suppress(RuntimeError):  # the watcher reports a store that is gone
                if self._store.check([key]):
                    return str(self._store.get(key).decode())
            if self.failure is not None:
                raise PeerError(self.failure)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _compare(self, other: int, own: str, *, theirs: str) -> None:
        if theirs == own:
            return
        (step, _), (their_step, _) = (published.split("\n", 1) for published in (own, theirs))
        what = (
            f"process {self.rank} of {self.count} and process {other} have different values of {step}"
            if step == their_step
            else f"process {self.rank} of {self.count} is at {step} and process {other} at {their_step}"
        )
        raise PeerError(
            f"{what}, so they cannot work together; give all the same recipe, files, library versions and kind of "
            "device, and start them again"
        )

    def _watch(self, store: Store) -> None:
        """Send heartbeats, check those of the others, and kill this process if it does not end after a failure."""
        seen = {other: ("", time.monotonic()) for other in range(self.count) if other != self.rank}
        beats = 0
        while not self._ended.wait(_HEARTBEAT) and self.failure is None:
            beats += 1
            try:
                store.set(f"beat/{self.rank}", str(beats))
                self.failure = _failure(store, self.rank, count=self.count) or _silent(store, seen, count=self.count)
            except RuntimeError as error:
                self.failure = (
                    f"the process with the store of all {self.count} processes is gone ({_first_line(error)}): it was "
                    f"killed, or ended by an error that its own output names; {to_continue()}"
                )
        if self.failure is None:
            return
        with suppress(RuntimeError):
            store.set(f"read/{self.rank}", "")
        if not self._ended.wait(_GRACE):
            sys.stderr.write(f"llmprune: {self.failure}\n")
            sys.stderr.flush()
            os._exit(PeerError.exit_code)


def _failure(store: Store, rank: int, *, count: int) -> str | None:
    """Return the message of another process that failed; None where there is none."""
    if not store.check(["failed"]):
        return None
    failed, message = store.get("failed").decode().split("\n", 1)
    return None if int(failed) == rank else f"process {failed} of {count} ended this run: {message}"


def _silent(store: Store, seen: dict[int, tuple[str, float]], *, count: int) -> str | None:
    """Return a message about a process without heartbeat. ``seen``: last heartbeat and its time, by process."""
    now = time.monotonic()
    for other, (last, since) in seen.items():
        key = f"beat/{other}"
        beat = store.get(key).decode() if store.check([key]) else ""
        if beat != last:
            seen[other] = beat, now
        elif now - since > _SILENCE:
            return (
                f"process {other} of {count} has given no sign of life for {now - since:.0f} s: it was killed, or its "
                f"machine is gone; {to_continue()}"
            )
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
