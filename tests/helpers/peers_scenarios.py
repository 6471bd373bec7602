"""One of two processes that go through failures between them; prints each outcome as a line of JSON."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from llmprune.common import distributed as processes
from llmprune.common import peers
from llmprune.common.errors import NumericalError
from llmprune.common.linalg import cross_validated_ridge as normal_equations

RANK = int(os.environ["RANK"])
peers._HEARTBEAT, peers._SILENCE, peers._GRACE, peers._LINGER = 0.05, 2.0, 30.0, 1.0


def scenario(act: Callable[[], Any]) -> None:
    """Run one scenario together with the other process, and print its outcome."""
    since = time.monotonic()
    try:
        with processes.synchronized():
            said = {"value": act()}
    except Exception as error:
        said = {"error": type(error).__name__, "said": str(error)}
    print(json.dumps({"scenario": act.__name__, "seconds": time.monotonic() - since} | said), flush=True)


def everything_matches() -> list[float]:
    """Exchange values without a fault; the first process pauses for longer than the heartbeat time limit."""
    if RANK == 0:
        time.sleep(2.2)
    total = torch.ones(3) * (RANK + 1)
    processes.sum_over_processes([total])
    processes.require_agreement("the recipe", "same")
    return [*total.tolist(), processes.broadcast_from_first(float(RANK)), float(processes.all_agree(RANK < 2))]


def one_raises() -> None:
    """Raise an error in the second process alone, while the first waits for it."""
    if RANK == 1:
        raise NumericalError("layer 3 puts out NaN")
    processes.broadcast_from_first(1)


def one_goes_elsewhere() -> None:
    """Take a branch in one process only."""
    if RANK == 1:
        processes.sum_over_processes([torch.ones(2)])
    processes.broadcast_from_first(1)


def other_values() -> None:
    """Use another recipe in each process."""
    processes.require_agreement("the recipe", f"recipe {RANK}")


def one_is_done() -> None:
    """End one process while the other has more to do."""
    if RANK == 0:
        processes.broadcast_from_first(1)


def one_cannot_solve() -> tuple[float | None, float]:
    """Let the second process have no stable solution at the ridge that the first one chose."""
    real = normal_equations._ridge
    normal_equations._ridge = lambda *given, ridge: None if RANK and ridge < 2 else real(*given, ridge=ridge)
    drawn = torch.Generator().manual_seed(0)
    equations = normal_equations.NormalEquations(None, folds=3)
    for fold in range(3):
        input_TF, noise_TD = torch.randn(50, 8, generator=drawn), torch.randn(50, 6, generator=drawn)
        equations.update(input_TF, None, inherited_TD=input_TF[:, :6] + noise_TD / 10, fold=fold)
    processes.sum_over_processes(equations.reducible_state())
    repair = equations.solve("layer 3")
    assert repair.delta_DF is not None
    return repair.ridge, float(repair.delta_DF.norm())


def both_raise() -> None:
    """Raise the same error in both, the first process a little later."""
    if RANK == 0:
        time.sleep(0.3)
    raise NumericalError("layer 3 puts out NaN")


def one_is_killed() -> None:
    """Kill the second process while the first is in a computation that does not end."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    peers._GRACE = 0.3
    time.sleep(60)


if __name__ == "__main__":
    survived = everything_matches, one_raises, one_goes_elsewhere, other_values, one_is_done, one_cannot_solve
    for act in (*survived, both_raise, one_is_killed):
        scenario(act)
