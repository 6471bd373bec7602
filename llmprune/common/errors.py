"""The errors that people see.

    LLMPruneError            exit 1   the run failed
    ├── RecipeError          exit 2   the recipe or the arguments are wrong
    ├── ModelError           exit 2   this model cannot be loaded or pruned as asked
    ├── CalibrationError     exit 2   the calibration text does not suffice
    ├── OutputError          exit 2   the output folder cannot be used
    ├── DiskError            exit 1   the disk is full or cannot be written
    ├── CheckpointError      exit 1   files of a model are missing or damaged
    ├── NumericalError       exit 1   NaN or infinity where numbers should be
    ├── VerificationError    exit 1   the saved model is not what was computed
    ├── HubError             exit 1   the hub refused, or cannot be reached
    ├── EvaluationError      exit 1   a task could not be evaluated
    ├── PeerError            exit 1   another process of the same run failed, or does something else
    └── GateNotMet           exit 3   the pruned model lost more than the gate allows, or nobody can tell

Each message says what is wrong, where, the limit, and what to do about it.
What cannot happen is an ``assert``, not one of these.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmprune.results.schema import Report


MOST_PROBLEMS = 20  # listed at once: a person mends some and asks again


class LLMPruneError(Exception):
    """Base of every error that is meant for people."""

    exit_code = 1


class RecipeError(LLMPruneError):
    """The recipe or an argument is wrong; ``problems`` has one sentence for each mistake, ``MOST_PROBLEMS`` at most."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str], source: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else shortened(problems, len(problems))
        self.source = source
        head = f"{source}: " if source else ""
        if len(self.problems) == 1:
            super().__init__(head + self.problems[0])
        else:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{head}{len(self.problems)} problems\n{listed}")


class ModelError(LLMPruneError):
    """The model cannot be loaded, or cannot be pruned as asked."""

    exit_code = 2


class CalibrationError(LLMPruneError):
    """The calibration or evaluation text is missing, empty or too short."""

    exit_code = 2


class OutputError(LLMPruneError):
    """The output folder holds something else, is in use, or cannot be made."""

    exit_code = 2


class DiskError(LLMPruneError):
    """The disk is too small for the result, or a write failed."""


class CheckpointError(LLMPruneError):
    """Weights are missing, unexpected, of the wrong shape, or cannot be read."""


class NumericalError(LLMPruneError):
    """NaN or infinity appeared in activations, statistics or weights."""


class VerificationError(LLMPruneError):
    """The saved checkpoint, loaded afresh, differs from what was computed."""


class EvaluationError(LLMPruneError):
    """An evaluation task is unknown, cannot be reached, or failed."""


class HubError(LLMPruneError):
    """The result could not be pushed to the hub, or something could not be read from it."""


class PeerError(LLMPruneError):
    """Another process of this run failed or died, or is about to do something else than this one."""


class GateNotMet(LLMPruneError):
    """The pruned model does not surely retain what the gate demands; a run's ``report`` has the figures."""

    exit_code = 3

    def __init__(self, message: str, report: Report | None = None) -> None:
        self.report = report
        super().__init__(message)


def shortened(problems: Sequence[str], count: int) -> list[str]:
    """The first ``MOST_PROBLEMS`` of ``count`` problems, and how many there are beyond them."""
    if count <= MOST_PROBLEMS + 1:
        return list(problems)
    return [*problems[:MOST_PROBLEMS], f"and {count - MOST_PROBLEMS:,} more problems"]


def did_you_mean(name: str, valid: Sequence[str]) -> str:
    """``; did you mean 'x'?``, or an empty string where nothing is near."""
    near = get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def to_continue() -> str:
    """Say how a run that was stopped is continued: ``--fresh`` would begin it anew."""
    return f"run the same command again{' without --fresh' if '--fresh' in sys.argv else ''} to continue"
