"""The other processes of a run: whether they are alive, and whether they are about to do the same.

torch's collectives wait for whoever is missing, and mix up what does not match. So before each exchange the processes
tell one another in a key-value store what comes next, and go on only when all say the same. A thread of each counts
up a key of its own: a process whose count stands still is dead, one that ends by an error leaves its sentence.
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
_BEAT = 2.0
_SILENCE = 180.0  # a process that has not counted for so long is dead
_GRACE = 60.0  # until a process that is in the middle of something ends, once another has failed
_LINGER = 10.0  # until all have read why this process ends, or that it is at the end as well
_LONGEST_PAUSE = 0.05


class Peers:
    """The processes of one run in step. ``connect`` opens a connection to the store, one for each thread."""

    def __init__(self, connect: Callable[[], Store], *, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.failure: str | None = None  # of another process
        self._store = connect()
        self._steps = 0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(connect(),), name="peers", daemon=True)
        self._watcher.start()

    def meet(self, step: str, value: str = "") -> None:
        """Wait until every process is at this step. Raises PeerError where one has failed or is at another.

        ``value``: what all must have the same.
        """
        number, self._steps = self._steps, self._steps + 1
        own = f"{step}\n{value}"
        self._store.set(f"{number}/{self.rank}", own)
        for other in range(self.count):
            if other != self.rank:
                self._compare(other, own, theirs=self._read(f"{number}/{other}"))
        if number > 1:  # all have read it: they are at the next step
            self._store.delete_key(f"{number - 2}/{self.rank}")

    def fail(self, sentence: str) -> list[int]:
        """Tell the others why this process ends; returns those that have not read it after a while: they are gone."""
        gone: list[int] = []
        with suppress(RuntimeError):  # the store went with the process that holds it
            if not self._store.check(["failed"]):
                self._store.set("failed", f"{self.rank}\n{sentence}")
            gone = self._linger("read")
        self._ended.set()
        return gone

    def end(self) -> None:
        """Go apart when all are at the end; the process that holds the store goes last."""
        self.meet("end")
        self._ended.set()
        with suppress(RuntimeError):
            self._linger("left")

    def _linger(self, word: str) -> list[int]:
        self._store.set(f"{word}/{self.rank}", "")
        until = time.monotonic() + _LINGER
        missing = [other for other in range(self.count) if other != self.rank]
        while missing and time.monotonic() < until:
            time.sleep(0.02)
            missing = [other for other in missing if not self._store.check([f"{word}/{other}"])]
        return missing

    def _read(self, key: str) -> str:
        pause = 0.0002  # asking again costs less than the store's own wait, which warns at every time-out
        while True:
            with suppress(RuntimeError):  # a store that is gone is the watcher's to tell
                if self._store.check([key]):
                    return str(self._store.get(key).decode())
            if self.failure is not None:
                raise PeerError(self.failure)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _compare(self, other: int, own: str, *, theirs: str) -> None:
        if theirs == own:
            return
        (step, _), (their_step, _) = (said.split("\n", 1) for said in (own, theirs))
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
        """Count, watch the others' counts, and end this process if it does not end itself when another has failed."""
        seen = {other: ("", time.monotonic()) for other in range(self.count) if other != self.rank}
        count = 0
        while not self._ended.wait(_BEAT) and self.failure is None:
            count += 1
            try:
                store.set(f"beat/{self.rank}", str(count))
                self.failure = _failure(store, self.rank, count=self.count) or _silent(store, seen, count=self.count)
            except RuntimeError as error:
                self.failure = (
                    f"the process that the {self.count} processes of this run meet at is gone ({_line(error)}): it was "
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
    if not store.check(["failed"]):
        return None
    who, sentence = store.get("failed").decode().split("\n", 1)
    return None if int(who) == rank else f"process {who} of {count} ended this run: {sentence}"


def _silent(store: Store, seen: dict[int, tuple[str, float]], *, count: int) -> str | None:
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


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
