"""Divergence of one cut with the closed-form repair, solved on some of the calibration windows.

Nothing is saved: the judged windows follow pass 2 through every finished layer, which is then released.

Shapes: N windows, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.anatomy.types import Anatomy
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.repair.folds import Folds
from llmprune.recipe.refit import Refit
from llmprune.search.judging import Judge

_TITLE = "search: repaired shape"


@dataclass(frozen=True)
class RepairWindows:
    """Windows [N, L] that repairs are solved on, their folds, and how they are passed through a model."""

    windows_NL: Tensor
    folds: Folds
    batch_size: int
    store: HiddenStateStore


def repaired_divergence(judge: Judge, anatomy: Anatomy, *, cut: Cut, refit: Refit, solved: RepairWindows) -> Tensor:
    """Return KL(dense ‖ cut and repaired) in nats per token, float64 [S], on the windows of a judge."""
    pruned = cut_decoder(judge.dense, anatomy=anatomy, cut=cut)
    judged = judge.forward(pruned)
    pruning = Pruning(
        judge.dense, pruned, anatomy=anatomy, cut=cut, refit=refit, follow=judged.pass_through, title=_TITLE
    )
    pruning.run(solved.windows_NL, solved.batch_size, store=solved.store, folds=solved.folds)
    return judge.divergences([judged.hidden_states])[:, 0]
