"""Windows of a search: which judge, which are repeated, and which repairs are solved on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.pipeline.context import RunContext, Search
from llmprune.pipeline.search.windows import (
    judged_windows,
    judging_batches,
    order_batches,
    repair_windows,
    schedule_of,
)
from llmprune.score.inputs import ScoringCriteria

LENGTH = 300
SOURCES = torch.tensor([0, 1, 2] * 8 + [0] * 16)


def context_of(sources_N: torch.Tensor | None = SOURCES) -> RunContext:
    """Return what the windows are chosen from: each has its number as its first token."""
    windows_NL = torch.arange(LENGTH).repeat(len(SOURCES), 1)
    windows_NL[:, 0] = torch.arange(len(SOURCES))
    inputs: Any = SimpleNamespace(
        recipe=SimpleNamespace(budget=None),
        windows=windows_NL,
        sources=sources_N,
        generated=None if sources_N is None else sources_N == 2,
        calibration_text=SimpleNamespace(begin=()),
        store_without_cache=lambda _: HiddenStateStore(),
    )
    search = Search(ScoringCriteria(), judged_windows(inputs))
    return cast(RunContext, SimpleNamespace(inputs=inputs, search=search, folder=SimpleNamespace(path=Path())))


def test_every_source_judges_by_windows_that_nothing_else_sees() -> None:
    """An eighth of each source's windows judge, at least three; repairs and the order of the layers see the others."""
    context = context_of()
    judged = set(context.search.judged_N.tolist()) if context.search else set()
    assert SOURCES[sorted(judged)].bincount().tolist() == [3, 3, 3]
    repaired = repair_windows(context, schedule_of(context.inputs).repair, batch_size=4)
    ordered = order_batches(context, batch_size=4).windows_NL
    for windows_NL in (repaired.windows_NL, ordered):
        numbers = windows_NL[:, 0].tolist()
        assert judged.isdisjoint(numbers)
        assert set(SOURCES[numbers].tolist()) == {0, 1, 2}
    assert repaired.folds.generated is not None


def test_the_last_source_repeats_the_first_half() -> None:
    """One window of each source comes once more, its first half twice; of every window the second half counts."""
    batches = judging_batches(context_of(), batch_size=4)
    assert batches.sources_N is not None
    assert batches.sources_N.bincount().tolist() == [3, 3, 3, 3]
    half = batches.windows_NL.shape[1] // 2
    repeated_RL = batches.windows_NL[batches.sources_N == 3]
    assert torch.equal(repeated_RL[:, :half], repeated_RL[:, half:])
    assert set(SOURCES[repeated_RL[:, 0]].tolist()) == {0, 1, 2}
    assert batches.first_target == half + 1


def test_layers_are_ordered_on_repetitions_too() -> None:
    """Every third window is there once more, its first half twice; of all the second half counts."""
    batches = order_batches(context_of(), batch_size=4)
    plain_NL, repeated_NL = batches.windows_NL.split([5, 2])
    half = plain_NL.shape[1] // 2
    assert torch.equal(plain_NL[::3, :half], repeated_NL[:, :half])
    assert torch.equal(repeated_NL[:, :half], repeated_NL[:, half:])
    assert batches.first_target == half + 1


def test_ready_tokens_without_sources_are_one_source() -> None:
    """Windows whose source is not known judge together."""
    batches = judging_batches(context_of(None), batch_size=4)
    assert batches.sources_N is not None
    assert batches.sources_N.bincount().tolist() == [5, 1]
