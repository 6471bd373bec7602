"""One of two processes that go through failures between them; prints each outcome as a line of JSON."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.common import distributed as processes
from llmprune.common import peers
from llmprune.common.errors import NumericalError
from llmprune.common.linalg import cross_validated_ridge as normal_equations
from llmprune.common.out_of_memory import BatchSize
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.recipe.model import ModelSource
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.testing import tiny_model

RANK = int(os.environ["RANK"])
# A busy machine may keep a process from its heartbeat for seconds: only the scenarios about silence have a short limit.
peers._HEARTBEAT, peers._SILENCE, peers._GRACE, peers._LINGER = 0.05, 60.0, 30.0, 1.0


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
    peers._SILENCE = 4.0
    if RANK == 0:
        time.sleep(4.2)
    total = torch.ones(3) * (RANK + 1)
    processes.sum_over_processes([total])
    processes.require_agreement("the recipe", "same")
    peers._SILENCE = 60.0
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


def _in_batches(number: int, *, most: int, early: bool) -> float:
    """Exchange a sum before and after the second process runs out of memory with batches of more than ``most``."""
    total = torch.ones(1)
    processes.sum_over_processes([total])
    if not early:
        processes.sum_over_processes([total])
    if RANK == 1 and number > most:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has a capacity of 1 GiB")
    if early:
        processes.sum_over_processes([total])
    return float(total)


def one_runs_out_of_memory() -> list[Any]:
    """Let the second process have memory for one window of four, in the middle of a step and at its end."""
    batch = BatchSize(4)
    released: list[None] = []
    values = []
    for number, most, early in ((1, 2, True), (2, 1, False)):
        work = partial(_in_batches, most=most, early=early)
        values.append(batch.run(f"pass {number}", work, release=lambda: released.append(None)))
    return [*values, batch.number, len(released), batch.reductions]


def one_window_does_not_fit() -> None:
    """Let the second process have no memory for a single window."""
    BatchSize(2).run("pass 1", partial(_in_batches, most=0, early=True), release=lambda: None)


def both_raise() -> None:
    """Raise the same error in both, the first process a little later."""
    if RANK == 0:
        time.sleep(0.3)
    raise NumericalError("layer 3 puts out NaN")


def sums_travel_together() -> dict[str, Any]:
    """Sum tensors of two types and of many shapes, one without neighbouring values and one too large for a buffer."""
    tensors = [
        torch.full((3, 2), RANK + 1.0),
        torch.full((), RANK + 2.0, dtype=torch.float64),
        torch.full((4, 6), RANK + 3.0)[:, 1:3],
        torch.zeros(0),
        torch.full((2**22,), RANK + 4.0),
    ]
    _exchanged()
    processes.sum_over_processes(tensors[:4])
    exchanges = _exchanged()
    processes.sum_over_processes(tensors)
    processes.sum_over_processes([])
    return {"values": [sorted(set(one.flatten().tolist())) for one in tensors], "exchanges": [exchanges, _exchanged()]}


def pass_1_exchanges_once_a_layer() -> dict[str, Any]:
    """Score the layers, neurons, heads and experts of a tiny mixture by two sources of text."""
    _exchanged()
    criteria = ScoringCriteria(depth=BlockInfluence(), width=Activation(), heads=Activation(), experts=Reap())
    ids_NL = torch.arange(3, 51).view(4, 12)
    with tempfile.TemporaryDirectory() as own:
        tiny_model("mixtral").save_pretrained(own)
        dense = open_decoder(ModelSource(id=processes.broadcast_from_first(own)))
        scores = score(
            dense,
            discover(dense.skeleton.config),
            criteria=criteria,
            calibration=CalibrationBatches(ids_NL, 1, sources_N=torch.tensor([0, 1, 1, 1]), combine="worst"),
        )
    exchanges = _exchanged()
    total = sum(
        float(part.double().sum()) for kind in (scores.neurons, scores.heads, scores.experts) for part in kind.values()
    )
    routed = float(sum(part.sum() for part in scores.routed.values()))
    own = [[one.layers.tolist(), *(part.tolist() for part in one.heads.values())] for one in scores.by_source]
    return {"exchanges": exchanges, "total": total, "routed": routed, "own": own}


_all_reduce, _calls = torch.distributed.all_reduce, list[str]()


def _counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    _calls.append(str(tensor.dtype))
    return _all_reduce(tensor, *args, **kwargs)


def _exchanged() -> dict[str, int]:
    """Return the number of exchanges since the last call, by type of number."""
    counts = dict(Counter(_calls))
    _calls.clear()
    return counts


def one_is_killed() -> None:
    """Kill the second process while the first is in a computation that does not end."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    peers._GRACE, peers._SILENCE = 0.3, 2.0
    time.sleep(60)


if __name__ == "__main__":
    torch.distributed.all_reduce = _counted
    survived = everything_matches, one_raises, one_goes_elsewhere, other_values, one_is_done, one_cannot_solve
    full = one_runs_out_of_memory, one_window_does_not_fit
    exchanges = sums_travel_together, pass_1_exchanges_once_a_layer
    for act in (*survived, *full, both_raise, *exchanges, one_is_killed):
        scenario(act)
