"""Run checks of next tools, each in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmprune.common.distributed import environment_of_one
from llmprune.common.errors import ModelError, RecipeError, did_you_mean
from llmprune.evaluation.next_tools.base import State, ToolCheck
from llmprune.evaluation.next_tools.registry import CHECKS

_LONGEST = 300  # characters of a reason


@dataclass(frozen=True)
class Outcome:
    """Row of the table: what one tool made of the checkpoint."""

    tool: str
    state: State
    told: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to check. ``report``: ``report.json`` of its run, if it has one."""

    folder: Path
    report: Path | None

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """Find the checkpoint in its own folder, or in that of its run. Raises ModelError."""
        path = path.expanduser()
        for folder in (path, path / "model"):
            if (folder / "config.json").is_file():
                report = folder.resolve().parent / "report.json"
                return cls(folder.resolve(), report if report.is_file() else None)
        raise ModelError(f"{path} has no config.json; give the folder of a checkpoint, or of a finished run")


def chosen_checks(names: Sequence[str]) -> list[ToolCheck]:
    """Return the checks whose names begin with a given one; all without any. Raises RecipeError for an unknown one."""
    unknown = [name for name in names if not any(_begins(check, name) for check in CHECKS)]
    if unknown:
        first = ", ".join(dict.fromkeys(check.partition(":")[0] for check in CHECKS))
        raise RecipeError(f"--only {unknown[0]}: no such tool{did_you_mean(unknown[0], [*CHECKS])}; there are {first}")
    return [check for name, check in CHECKS.items() if not names or any(_begins(name, wanted) for wanted in names)]


def _begins(check: str, name: str) -> bool:
    return check.lower().startswith(name.lower())


def run_checks(checkpoint: Checkpoint, checks: Sequence[ToolCheck], *, time_limit: float) -> Iterator[Outcome]:
    """Yield the outcome of each check, as soon as it is known. ``time_limit``: seconds for each."""
    for check in checks:
        if (install := check.absent) is not None:
            yield Outcome(check.name, "not installed", install)
            continue
        start = time.perf_counter()
        with TemporaryDirectory(prefix="llmprune-check-") as scratch:
            state, told = _run(check.name, checkpoint, scratch=scratch, time_limit=time_limit)
        if len(told) > _LONGEST:
            told = told[: _LONGEST - 1] + "…"
        yield Outcome(check.name, state, told, round(time.perf_counter() - start, 1))


def _run(name: str, checkpoint: Checkpoint, *, scratch: str, time_limit: float) -> tuple[State, str]:
    """Return state and sentence of one check."""
    command = [sys.executable, "-m", "llmprune.evaluation.next_tools.worker", name, str(checkpoint.folder), scratch]
    command += [str(checkpoint.report)] if checkpoint.report else []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # so that what the tool started ends with it
        env=environment_of_one(),
    )
    try:
        output, errors = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        _end(process)
        return "fails", f"it took longer than {time_limit:g} s (--time-limit)"
    except BaseException:
        _end(process)
        raise
    try:
        found = json.loads(output.strip().splitlines()[-1])
        return found["state"], found["told"]
    except (ValueError, LookupError, TypeError):
        return "fails", _crash(process.returncode, errors)


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _crash(code: int, errors: str) -> str:
    """Return how a process ended that printed no outcome."""
    last = (errors.strip().splitlines() or ["no message"])[-1]
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}: {last}"
    return f"the process ended with {code}: {last}"
