"""Plans for the service, made by a warm worker process with limits of time and memory.

The worker starts when first needed, ends when nobody asks for a while, and is killed when
a plan takes too much; the service goes on whatever happens to it.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from llmprune.schema import format_size
from llmprune.service.memory import memory_of
from llmprune.service.plan_queue import PlannerBusy, PlanQueue

WORKER = (sys.executable, "-m", "llmprune.service.plan_worker")
# Measured: the process starts in 6 s; DeepSeek-V3 takes 9 s and 2.0 GB of anonymous memory, Llama 3.1 405B 4 s, 0.5 GB.
TIME = 60.0  # seconds
MEMORY = 5 * 10**9  # bytes
_LONGEST = 10**6  # bytes of an answer; a plan has about a thousand
_LOOK_EVERY = 0.25  # seconds
_REMEMBERED = 64


class _Spent(Exception):
    """A plan took more than it may; the text says what."""


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
        self._plans: OrderedDict[tuple[str, tuple[str, ...]], tuple[float, dict[str, Any]]] = OrderedDict()

    def plan(self, recipe: str, overrides: Sequence[str], *, caller: str) -> dict[str, Any]:
        """``{"plan": …}`` or ``{"problems": […]}``.

        Raises PlannerBusy where the turn does not come in time, TooManyPlans where the caller's own plans are too
        many or took too much.
        """
        key = recipe, tuple(overrides)
        with self.queue.place(caller):
            if not self._turn.acquire(timeout=self.limit):
                raise PlannerBusy("other plans are being made; ask again in a minute", 60.0)
            try:
                made, known = self._plans.get(key, (0.0, {}))
                if known and time.monotonic() - made < self.idle:
                    return known
                answer = self._ask({"recipe": recipe, "overrides": list(overrides)}, caller)
                if "plan" in answer:  # problems may pass: the hub is away, a file is missing
                    self._plans[key] = time.monotonic(), answer
                while len(self._plans) > _REMEMBERED:
                    self._plans.popitem(last=False)
                return answer
            finally:
                self._close_later()
                self._turn.release()

    def close(self) -> None:
        """End the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()

    def _close_later(self) -> None:
        """End the worker where nobody asks for a while: it holds the better part of a gigabyte."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(self.idle, self._close_if_free)
        self._timer.daemon = True
        self._timer.start()

    def _close_if_free(self) -> None:
        if self._turn.acquire(blocking=False):  # else a plan is being made, which sets the time anew
            try:
                self.close()
            finally:
                self._turn.release()

    def _ask(self, question: dict[str, Any], caller: str) -> dict[str, Any]:
        """The worker's answer; where it has none, the worker is ended and the caller kept out for a while."""
        try:
            answer: dict[str, Any] = json.loads(self._talk(json.dumps(question).encode() + b"\n"))
            return answer
        except _Spent as spent:
            said = str(spent)
        except (OSError, ValueError):
            said = "the process that makes plans ended; the model's config may be too large for it"
        self.close()
        self.queue.penalise(caller)
        return {"problems": [said]}

    def _talk(self, question: bytes) -> bytes:
        """A line to the worker and its answer. Raises _Spent where a limit is reached, OSError where it has ended."""
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            self._worker = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        assert self._worker.stdin is not None, "piped"
        assert self._worker.stdout is not None, "piped"
        self._worker.stdin.write(question)
        deadline, answer = time.monotonic() + self.limit, b""
        while not answer.endswith(b"\n"):
            if not select.select([self._worker.stdout], [], [], _LOOK_EVERY)[0]:
                self._hold_to_limits(self._worker.pid, deadline)
                continue
            part = self._worker.stdout.read(65_536)
            if not part:
                raise OSError("the worker ended")
            answer += part
            if len(answer) > _LONGEST:
                raise _Spent(f"the plan is longer than {format_size(_LONGEST)}; the model's config names too much")
        return answer

    def _hold_to_limits(self, worker: int, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise _Spent(f"the plan took longer than {self.limit:g} s; run llmprune plan where you can wait")
        if memory_of([psutil.Process(worker)]) > self.memory:
            raise _Spent(
                f"the plan took more than {format_size(self.memory)} of memory; run llmprune plan where there is more"
            )
