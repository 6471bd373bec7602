"""Plans for the service, made by a warm worker process with limits of time and memory.

The worker starts when first needed, ends when nobody asks for a while, and is killed when
a plan takes too much; the service goes on whatever happens to it.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from llmprune.common.schema import format_size
from llmprune.service.memory import memory_of
from llmprune.service.planner.queue import PlannerBusy, PlanQueue

WORKER = (sys.executable, "-m", "llmprune.service.planner.worker")
# Measured: the process starts in 6 s; DeepSeek-V3 takes 9 s and 2.0 GB of anonymous memory, Llama 3.1 405B 4 s, 0.5 GB.
TIME = 60.0  # seconds
MEMORY = 5 * 10**9  # bytes
_LONGEST = 10**6  # bytes of an answer; a plan has about a thousand
_LOOK_EVERY = 0.25  # seconds
_REMEMBERED = 64
_Key = tuple[str, tuple[str, ...], tuple[str, ...]]  # recipe, overrides, wrong keys
_ENDED = "the process that makes plans ended; the model's config may be too large for it"


class _Spent(Exception):
    """A plan took more than it may or ended the worker; the text says what."""


class Planner:
    """One worker, one plan at a time; plans are remembered for a while."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str] = WORKER,
        *,
        limit: float = TIME,
        memory: int = MEMORY,
        idle: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.command, self.limit, self.memory, self.idle = folder, tuple(command), limit, memory, idle
        self.environment = environment  # of the worker; None: this process's
        self.queue = PlanQueue()
        self._turn = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._timer: threading.Timer | None = None
        self._plans: OrderedDict[_Key, tuple[float, dict[str, Any]]] = OrderedDict()

    def plan(self, recipe: str, overrides: Sequence[str], *, caller: str, wrong: Sequence[str] = ()) -> dict[str, Any]:
        """``{"plan": …}`` or ``{"problems": […]}``; ``wrong``: keys that were left out of the recipe as wrong.

        Raises PlannerBusy where the turn does not come in time or the worker cannot start, TooManyPlans where the
        caller's own plans are too many or took too much.
        """
        key = recipe, tuple(overrides), tuple(wrong)
        with self.queue.place(caller):
            if not self._turn.acquire(timeout=self.limit):
                raise PlannerBusy("other plans are being made; ask again in a minute", 60.0)
            try:
                made, known = self._plans.get(key, (0.0, {}))
                if known and time.monotonic() - made < self.idle:
                    return known
                answer = self._ask({"recipe": recipe, "overrides": list(overrides), "wrong": list(wrong)}, caller)
                if "plan" in answer:  # problems may pass: the hub is away, a file is missing
                    self._plans[key] = time.monotonic(), answer
                while len(self._plans) > _REMEMBERED:
                    self._plans.popitem(last=False)
                return answer
            finally:
                self._close_later()
                self._turn.release()

    def close(self) -> None:
        """Kill the worker. A plan in the making ends too, and the thread that waits for it reaps the worker."""
        worker = self._worker
        if worker is not None:
            worker.kill()
        self._end_worker_if_free()

    def _close_later(self) -> None:
        """End the worker where nobody asks for a while: it holds the better part of a gigabyte."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(self.idle, self._end_worker_if_free)
        self._timer.daemon = True
        self._timer.start()

    def _end_worker_if_free(self) -> None:
        if self._turn.acquire(blocking=False):  # else a plan is being made, which sets the time anew
            try:
                self._end_worker()
            finally:
                self._turn.release()

    def _end_worker(self) -> None:
        """Kill and reap the worker; only the thread that holds the turn may do so."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()

    def _ask(self, question: dict[str, Any], caller: str) -> dict[str, Any]:
        """The worker's answer; where it has none, the worker is ended and the caller kept out for a while."""
        worker = self._running_worker()
        try:
            return self._answer(worker, json.dumps(question).encode() + b"\n")
        except _Spent as spent:
            self._end_worker()
            self.queue.penalise(caller)
            return {"problems": [str(spent)]}

    def _running_worker(self) -> subprocess.Popen[bytes]:
        """The worker, started anew where there is none. Raises PlannerBusy where the system starts no process."""
        if self._worker is None or self._worker.poll() is not None:
            self._end_worker()
            try:
                self._worker = subprocess.Popen(
                    self.command,
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                )
            except OSError as error:  # no memory or no open files left: not the caller's doing
                raise PlannerBusy(
                    f"the process that makes plans cannot start ({error.strerror}); ask again in a minute", 60.0
                ) from error
        return self._worker

    def _answer(self, worker: subprocess.Popen[bytes], question: bytes) -> dict[str, Any]:
        """Send the worker a line and read its answer. Raises _Spent at a limit, a dead worker or a bad answer."""
        assert worker.stdin is not None, "piped"
        try:
            worker.stdin.write(question)
        except BrokenPipeError:
            raise _Spent(_ENDED) from None
        line = self._read_line(worker)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise _Spent(_ENDED) from None
        return answer

    def _read_line(self, worker: subprocess.Popen[bytes]) -> bytes:
        assert worker.stdout is not None, "piped"
        deadline, line = time.monotonic() + self.limit, b""
        with selectors.PollSelector() as selector:  # select takes no descriptor above 1,023; epoll needs one of its own
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(_LOOK_EVERY):
                    self._hold_to_limits(worker.pid, deadline)
                    continue
                part = worker.stdout.read(65_536)
                if not part:
                    raise _Spent(_ENDED)
                line += part
                if len(line) > _LONGEST:
                    raise _Spent(f"the plan is longer than {format_size(_LONGEST)}; the model's config names too much")
        return line

    def _hold_to_limits(self, worker: int, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise _Spent(f"the plan took longer than {self.limit:g} s; run llmprune plan where you can wait")
        if memory_of([psutil.Process(worker)]) > self.memory:
            raise _Spent(
                f"the plan took more than {format_size(self.memory)} of memory; run llmprune plan where there is more"
            )
