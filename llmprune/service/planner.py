"""Plans for the service, made by a warm worker process with a time limit.

The worker starts when first needed, ends when nobody asks for a while, and is killed when
a plan takes too long; the service goes on whatever happens to it.
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

from llmprune.errors import LLMPruneError

WORKER = (sys.executable, "-m", "llmprune.service.plan_worker")
_REMEMBERED = 64


class PlannerBusy(LLMPruneError):
    """Somebody else's plan takes all the time."""


class Planner:
    """One worker, one plan at a time; answers are remembered for a while."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str] = WORKER,
        limit: float = 120.0,
        idle: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.command, self.limit, self.idle = folder, tuple(command), limit, idle
        self.environment = environment  # of the worker; None: this process's
        self._turn = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._timer: threading.Timer | None = None
        self._answers: OrderedDict[tuple[str, tuple[str, ...]], tuple[float, dict[str, Any]]] = OrderedDict()

    def plan(self, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
        """``{"plan": …}`` or ``{"problems": […]}``. Raises PlannerBusy where the turn does not come in time."""
        key = recipe, tuple(overrides)
        if not self._turn.acquire(timeout=self.limit):
            raise PlannerBusy("other plans are being made; ask again in a minute")
        try:
            made, known = self._answers.get(key, (0.0, {}))
            if known and time.monotonic() - made < self.idle:
                return known
            answer = self._ask({"recipe": recipe, "overrides": list(overrides)})
            self._answers[key] = time.monotonic(), answer
            while len(self._answers) > _REMEMBERED:
                self._answers.popitem(last=False)
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

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            line = self._talk(json.dumps(question).encode() + b"\n")
            answer: dict[str, Any] = json.loads(line)
            return answer
        except TimeoutError:
            self.close()
            return {"problems": [f"the plan took longer than {self.limit:g} s; run llmprune plan where you can wait"]}
        except (OSError, ValueError):
            self.close()
            return {"problems": ["the process that makes plans ended; the model's config may be too large for it"]}

    def _talk(self, question: bytes) -> bytes:
        """A line to the worker and its answer."""
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
            if not select.select([self._worker.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = self._worker.stdout.read(65_536)
            if not part:
                raise OSError("the worker ended")
            answer += part
        return answer
