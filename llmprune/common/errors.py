"""Errors that a user sees, with their exit codes.

    LLMPruneError            exit 1   the run failed
    ├── RecipeError          exit 2   the recipe or the arguments are wrong
    ├── ModelError           exit 2   the model cannot be loaded, or not pruned as requested
    ├── CalibrationError     exit 2   the calibration text is missing or insufficient
    ├── OutputError          exit 2   the output folder cannot be used
    ├── DiskError            exit 1   the disk is full or cannot be written
    ├── CheckpointError      exit 1   files of a model are missing or damaged
    ├── NumericalError       exit 1   NaN or infinity in activations, statistics or weights
    ├── VerificationError    exit 1   the saved model differs from the computed one
    ├── HubError             exit 1   the hub refused the request or cannot be reached
    ├── EvaluationError      exit 1   a task could not be evaluated
    ├── DeviceError          exit 1   a GPU is out of memory, or failed
    │   └── DeviceMemoryError  exit 1  a single window does not fit into a GPU's memory
    ├── PeerError            exit 1   another process of the run failed, or is at another step
    ├── ServiceError         exit 1   the service refused a request, or its answer cannot be read
    │   ├── ServiceUnreachable  exit 1  nothing answers at its address, or the connection broke
    │   ├── ServiceBusy      exit 1   it has no room for the request now
    │   ├── AccessDenied     exit 1   the token is missing, wrong, or may not do this
    │   ├── NotFound         exit 1   it has no such job or file, or the caller may not read it
    │   ├── StateConflict    exit 1   the job's state does not allow the request
    │   └── JobFailed        exit 1   the job ended without success
    └── GateNotMet           exit 3   the retention is below the gate, or not certain to reach it

Each message names the problem, its place, the limit and the remedy. Errors of the program itself are
``assert`` statements.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches

MOST_PROBLEMS = 20  # listed at once; a person corrects some and tries again


class LLMPruneError(Exception):
    """Base class of every error that is meant for users."""

    exit_code = 1


class RecipeError(LLMPruneError):
    """The recipe or an argument is wrong.

    ``problems``: a sentence for each mistake, of which the first ``MOST_PROBLEMS`` are listed; ``source``: the recipe.
    """

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
    """The model cannot be loaded, or not pruned as requested."""

    exit_code = 2


class CalibrationError(LLMPruneError):
    """The calibration or evaluation text is missing, empty or too short."""

    exit_code = 2


class OutputError(LLMPruneError):
    """The output folder has other content, is in use, or cannot be created."""

    exit_code = 2


class DiskError(LLMPruneError):
    """The disk is too small for the result, or a write failed."""


class CheckpointError(LLMPruneError):
    """Weights are missing, unexpected, of the wrong shape, or cannot be read."""


class NumericalError(LLMPruneError):
    """NaN or infinity appeared in activations, statistics or weights."""


class VerificationError(LLMPruneError):
    """The saved checkpoint, loaded in a fresh process, differs from the computed model."""


class EvaluationError(LLMPruneError):
    """An evaluation task is unknown, cannot be reached, or failed."""


class HubError(LLMPruneError):
    """The hub refused a push or a read, or cannot be reached."""


class DeviceError(LLMPruneError):
    """A GPU is out of memory, or failed."""


class DeviceMemoryError(DeviceError):
    """A single window does not fit into a GPU's memory."""


class PeerError(LLMPruneError):
    """Another process of this run failed, died, or is at another step."""


class ServiceError(LLMPruneError):
    """The service refused a request, or its answer cannot be read. ``status``: of its answer; None without one."""

    status: int | None = None


class ServiceUnreachable(ServiceError):
    """Nothing answers at the service's address, or the connection broke again and again."""


class ServiceBusy(ServiceError):
    """The service has no room for the request now: too many requests or jobs, or a full disk."""


class AccessDenied(ServiceError):
    """The token is missing or wrong, or its owner may not do this."""


class NotFound(ServiceError):
    """The service has no such job or file, or the caller may not read it."""


class StateConflict(ServiceError):
    """The job's state does not allow the request, such as the cancellation of an ended job."""


class JobFailed(ServiceError):
    """The job ended without success: it failed, was cancelled, or did not pass its gate."""


class TrainingStopped(KeyboardInterrupt):
    """Ctrl-C in a training, whose state is saved after ``step`` of ``steps``. ``best``: 0 where no step helped."""

    def __init__(self, step: int, steps: int, *, best: int) -> None:
        found = f"best so far step {best}" if best else "no better so far than before the training"
        super().__init__(f"stopped at step {step} of {steps}, {found}")


class GateNotMet(LLMPruneError):
    """The retention is below the gate, or not certain to reach it. A run raises it after its report is written."""

    exit_code = 3


def shortened(problems: Sequence[str], count: int) -> list[str]:
    """Return the first ``MOST_PROBLEMS`` of ``count`` problems, and a line with the number of the others."""
    if count <= MOST_PROBLEMS + 1:
        return list(problems)
    return [*problems[:MOST_PROBLEMS], f"and {count - MOST_PROBLEMS:,} more problems"]


def did_you_mean(name: str, valid: Sequence[str]) -> str:
    """Return ``; did you mean 'x'?``, or an empty string where no valid name is similar."""
    near = get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def to_continue() -> str:
    """Return the instruction to continue a stopped run; ``--fresh`` would start it over."""
    return f"run the same command again{' without --fresh' if '--fresh' in sys.argv else ''} to continue"
