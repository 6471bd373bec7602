"""Calibration windows of a search: to judge shapes, to order layers, and to solve repairs.

Shapes and layers are also judged on windows whose first half comes twice. Ordinary text hardly shows that a cut takes a
model's ability to copy from its context: SmolLM2 without four layers lost less on prose than with narrower MLPs of the
same size, and eight times as much on the second halves. Code, sums and conversations depend on that ability, which
attention heads in a few layers have together ("induction heads", arXiv 2209.11895).

Shapes: N windows of the calibration, R of them repeated, L sequence length, H half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmprune.common.distributed import world_size
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.inputs import RunInputs
from llmprune.prune.repair.folds import Folds
from llmprune.recipe.search_schedule import ORDER_TOKENS, REPEATED_TO_ORDER, Schedule, judged_of_source, least_judged
from llmprune.score.inputs import CalibrationBatches
from llmprune.search.repaired import RepairWindows


def schedule_of(inputs: RunInputs) -> Schedule:
    """Return the schedule of a search on the calibration windows."""
    budget, by_source = inputs.recipe.budget, sources_of(inputs).bincount().tolist()
    quick = budget is not None and budget.quick
    return Schedule.of(by_source, inputs.windows.shape[1], processes=world_size(), quick=quick)


def sources_of(inputs: RunInputs) -> Tensor:
    """Return the source of each calibration window, int64 [N]: one for all where they are not known."""
    count = len(inputs.windows)
    return torch.zeros(count, dtype=torch.int64) if inputs.sources is None else inputs.sources


def judged_windows(inputs: RunInputs) -> Tensor:
    """Return the numbers of the windows that judge shapes, ascending: evenly spaced over those of each source."""
    sources_N = sources_of(inputs)
    least = least_judged(int(sources_N.max()) + 1, processes=world_size())
    return _of_each_source(sources_N, partial(judged_of_source, least=least))


def judging_batches(context: RunContext, *, batch_size: int) -> CalibrationBatches:
    """Return the batches of the windows that judge shapes: their beginnings, of which the second half counts.

    The last source has one window of each of the others, the first half of it twice.
    """
    inputs, judged_N = context.inputs, _searched(context)
    windows_NL = inputs.windows[judged_N, : schedule_of(inputs).judged_tokens]
    sources_N = torch.unique(sources_of(inputs)[judged_N], return_inverse=True)[1]
    count = int(sources_N.max()) + 1
    firsts_R = torch.tensor([int((sources_N == source).nonzero()[0]) for source in range(count)])
    all_NL = torch.cat([windows_NL, _repeated(windows_NL[firsts_R])])
    all_N = torch.cat([sources_N, torch.full_like(firsts_R, count)])
    first = all_NL.shape[1] // 2 + 1  # nothing before it says how the repetition begins
    return replace(_batches(context, all_NL, batch_size=batch_size, sources_N=all_N), first_target=first)


def order_batches(context: RunContext, *, batch_size: int) -> CalibrationBatches:
    """Return the batches that layers are ordered on: windows of every source that the scores see too.

    Every third of them is there once more, with the first half of it twice; of all the second half counts.
    """
    inputs = context.inputs
    unseen_N, sources_N = _unseen(context), sources_of(inputs)
    order_N = unseen_N[sources_N[unseen_N].argsort(stable=True)]
    windows_NL = inputs.windows[order_N[_spaced(len(order_N), schedule_of(inputs).ordering)], :ORDER_TOKENS]
    all_NL = torch.cat([windows_NL, _repeated(windows_NL[::REPEATED_TO_ORDER])])
    batches = _batches(context, all_NL, batch_size=batch_size, sources_N=None)
    return replace(batches, first_target=all_NL.shape[1] // 2 + 1)


def repair_windows(context: RunContext, number: int, *, batch_size: int) -> RepairWindows:
    """Return ``number`` windows that the repairs of a search are solved on: none of those that judge shapes."""
    inputs = context.inputs
    unseen_N, sources_N = _unseen(context), sources_of(inputs)
    order_N = unseen_N[sources_N[unseen_N].argsort(stable=True)]
    chosen_N = order_N[_spaced(len(order_N), number)].sort().values
    own_N = None if inputs.sources is None else torch.unique(sources_N[chosen_N], return_inverse=True)[1]
    generated_N = None if inputs.generated is None else inputs.generated[chosen_N]
    if generated_N is not None and (not generated_N.any() or generated_N.all()):
        generated_N = None
    windows_NL = inputs.windows[chosen_N]
    store = _batches(context, windows_NL, batch_size=batch_size, sources_N=None).store
    return RepairWindows(windows_NL, Folds.of(windows_NL, own_N, generated_N=generated_N), batch_size, store)


def _searched(context: RunContext) -> Tensor:
    assert context.search is not None, "a search has windows that judge"
    return context.search.judged_N


def _unseen(context: RunContext) -> Tensor:
    """Return the numbers of the windows that judge nothing; all where there is only one window."""
    kept_N = torch.ones(len(context.inputs.windows), dtype=torch.bool)
    kept_N[_searched(context)] = False
    return kept_N.nonzero().squeeze(1)


def _of_each_source(sources_N: Tensor, count: Callable[[int], int]) -> Tensor:
    """Return the numbers of ``count`` windows of each source, evenly spaced over them, ascending."""
    chosen = [
        own_N[_spaced(len(own_N), count(len(own_N)))]
        for own_N in ((sources_N == source).nonzero().squeeze(1) for source in range(int(sources_N.max()) + 1))
    ]
    return torch.cat(chosen).sort().values


def _spaced(length: int, number: int) -> Tensor:
    """Return ``number`` indices, or all, from the middle of as many equal parts of a length."""
    number = min(number, length)
    return (torch.arange(number) * 2 + 1) * length // max(2 * number, 1)


def _repeated(windows_NL: Tensor) -> Tensor:
    """Return windows of the same length, in which the first half comes twice."""
    half = windows_NL.shape[1] // 2
    return torch.cat([windows_NL[:, :half], windows_NL[:, :half], windows_NL[:, 2 * half :]], dim=1)


def _batches(
    context: RunContext, windows_NL: Tensor, *, batch_size: int, sources_N: Tensor | None
) -> CalibrationBatches:
    inputs = context.inputs
    store = inputs.store_without_cache(context.folder.path)
    return CalibrationBatches(windows_NL, batch_size, store, inputs.calibration_text.begin, sources_N)
