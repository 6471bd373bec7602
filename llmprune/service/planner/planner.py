"""Plans for the service, made by a worker process with limits on time and memory.

The worker starts when it is first needed, ends after a while without requests, and is killed when a plan exceeds a
limit. The service is not affected by whatever happens to it.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from llmprune.common.schema import format_size
from llmprune.service.memory import memory_of
from llmprune.service.planner.queue import PlannerBusy, PlanQueue

WORKER = (sys.executable, "-m", "llmprune.service.planner.worker")
_MOST_BUSY = 5.0  # times the limit on time, on a machine that does much else
# Measured: the process starts in 6 s; DeepSeek-V3 takes 9 s and 2.0 GB of anonymous memory, Llama 3.1 405B 4 s, 0.5 GB.
TIME_LIMIT = 60.0  # seconds
MEMORY_LIMIT = 5 * 10**9  # bytes
_MAX_ANSWER = 10**6  # bytes; a plan has about a thousand
_CHECK_EVERY = 0.25  # seconds between checks of the limits
_MAX_CACHED = 64  # plans
_ENDED = "the process that makes plans ended; the model's config may be too large for it"


@dataclass(frozen=True)
class _Question:
    """Question to the worker; ``wrong``: keys that were left out of the recipe as wrong."""

    recipe: str
    overrides: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class _Variants:
    """Question to the worker for the times of several recipes, each with its overrides."""

    variants: tuple[tuple[str, tuple[str, ...]], ...]


class _LimitExceededError(Exception):
    """A plan exceeded a limit or ended the worker; the message says which."""


class Planner:
    """Makes one plan at a time in one worker, and caches plans for ``idle`` seconds."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str] = WORKER,
        *,
        limit: float = TIME_LIMIT,
        memory: int = MEMORY_LIMIT,
        idle: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.command, self.limit, self.memory, self.idle = folder, tuple(command), limit, memory, idle
        self.environment = environment  # of the worker; None: that of this process
        self.queue = PlanQueue()
        self._turn = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._timer: threading.Timer | None = None
        self._plans: OrderedDict[_Question | _Variants, tuple[float, dict[str, Any]]] = OrderedDict()

    def plan(self, recipe: str, overrides: Sequence[str], *, caller: str, wrong: Sequence[str] = ()) -> dict[str, Any]:
        """Return ``{"plan": …}`` or ``{"problems": […]}``.

        ``wrong``: keys that were left out of the recipe as wrong. Raises PlannerBusy where other plans take too long or
        the worker cannot start, TooManyPlans where the caller has another plan under way or exceeded a limit before.
        """
        return self._answered(_Question(recipe, tuple(overrides), tuple(wrong)), caller)

    def times(self, recipes: Sequence[tuple[str, Sequence[str]]], *, caller: str) -> list[dict[str, Any] | None]:
        """Return for each recipe, with its overrides, ``{"seconds": …, "is_complete": …}``; None where it is not known.

        Raises PlannerBusy and TooManyPlans as ``plan``, beside which a caller may ask for them.
        """
        question = _Variants(tuple((recipe, tuple(overrides)) for recipe, overrides in recipes))
        answer = self._answered(question, f"times for {caller}")
        found: list[dict[str, Any] | None] = answer.get("times") or [None] * len(recipes)
        return found

    def _answered(self, question: _Question | _Variants, caller: str) -> dict[str, Any]:
        """Return the worker's answer, or the one that it gave a while ago."""
        with self.queue.place(caller):
            if not self._turn.acquire(timeout=self.limit):
                raise PlannerBusy("other plans are being made; ask again in a minute", 60.0)
            try:
                made, cached = self._plans.get(question, (0.0, {}))
                if cached and time.monotonic() - made < self.idle:
                    return cached
                answer = self._ask(question, caller)
                if "problems" not in answer:  # problems may be temporary: the hub does not answer, a file is missing
                    self._plans[question] = time.monotonic(), answer
                while len(self._plans) > _MAX_CACHED:
                    self._plans.popitem(last=False)
                return answer
            finally:
                self._close_later()
                self._turn.release()

    def close(self) -> None:
        """Kill the worker. The thread that waits for a plan reaps the worker, and its plan fails."""
        worker = self._worker
        if worker is not None:
            worker.kill()
        self._end_worker_if_free()

    def _close_later(self) -> None:
        """End the worker after ``idle`` seconds without requests, because it uses most of a gigabyte of memory."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(self.idle, self._end_worker_if_free)
        self._timer.daemon = True
        self._timer.start()

    def _end_worker_if_free(self) -> None:
        if self._turn.acquire(blocking=False):  # otherwise a plan is being made, which sets the timer again
            try:
                self._end_worker()
            finally:
                self._turn.release()

    def _end_worker(self) -> None:
        """Kill and reap the worker. The caller must hold ``_turn``."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()

    def _ask(self, question: _Question | _Variants, caller: str) -> dict[str, Any]:
        """Return the worker's answer. Above a limit the worker is ended and the caller refused for a while."""
        worker = self._running_worker()
        try:
            return self._answer(worker, json.dumps(asdict(question)).encode() + b"\n")
        except _LimitExceededError as error:
            self._end_worker()
            self.queue.penalise(caller)
            return {"problems": [str(error)]}

    def _running_worker(self) -> subprocess.Popen[bytes]:
        """Return the worker, started if there is none. Raises PlannerBusy where the process cannot be started."""
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
            except OSError as error:  # no memory or no open files left, which is not the caller's fault
                raise PlannerBusy(
                    f"the process that makes plans cannot start ({error.strerror}); ask again in a minute", 60.0
                ) from error
        return self._worker

    def _answer(self, worker: subprocess.Popen[bytes], question: bytes) -> dict[str, Any]:
        """Send a line to the worker and read its answer. Raises _LimitExceededError, also where the worker died."""
        assert worker.stdin is not None, "piped"
        try:
            worker.stdin.write(question)
        except BrokenPipeError:
            raise _LimitExceededError(_ENDED) from None
        line = self._read_line(worker)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise _LimitExceededError(_ENDED) from None
        return answer

    def _read_line(self, worker: subprocess.Popen[bytes]) -> bytes:
        assert worker.stdout is not None, "piped"
        limit, line = self.limit * _busy(), b""
        deadline = time.monotonic() + limit
        with (
            selectors.PollSelector() as selector
        ):  # select takes no descriptor above 1,023; epoll needs one more descriptor
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(_CHECK_EVERY):
                    self._check_limits(worker.pid, deadline=deadline, limit=limit)
                    continue
                part = worker.stdout.read(65_536)
                if not part:
                    raise _LimitExceededError(_ENDED)
                line += part
                if len(line) > _MAX_ANSWER:
                    raise _LimitExceededError(
                        f"the plan is longer than {format_size(_MAX_ANSWER)}; the model's config names too much"
                    )
        return line

    def _check_limits(self, worker: int, *, deadline: float, limit: float) -> None:
        """Raise _LimitExceededError where the worker exceeded its time or memory."""
        if time.monotonic() > deadline:
            raise _LimitExceededError(f"the plan took longer than {limit:.0f} s; run llmprune plan where you can wait")
        if memory_of([psutil.Process(worker)]) > self.memory:
            raise _LimitExceededError(
                f"the plan took more than {format_size(self.memory)} of memory; run llmprune plan where there is more"
            )


def _busy() -> float:
    """Return how many programs want each processor, from 1 to 5: on a busy machine a plan may take as much longer."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    return min(max(load / (os.cpu_count() or 1), 1.0), _MOST_BUSY)
