"""A cut and repaired model whose layers stay in memory: for benchmarks that judge many cuts of one small model."""

from __future__ import annotations

from torch import Tensor

from llmprune.anatomy.types import Anatomy
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.repair.folds import Folds
from llmprune.recipe.refit import Refit

BATCH = 4  # windows


def prune_in_memory(
    dense: Decoder,
    cut: Cut,
    *,
    anatomy: Anatomy,
    refit: bool,
    windows: tuple[Tensor, Tensor | None],
    store: HiddenStateStore,
) -> Decoder:
    """Run pass 2 on calibration windows [N, L] with their sources [N], or None for one source."""
    pruned, layers = cut_decoder(dense, anatomy=anatomy, cut=cut), dict[int, Tensors]()
    refits = Refit() if refit else None
    pruning = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=refits, write=layers.__setitem__)
    windows_NL, sources_N = windows
    pruning.run(windows_NL, BATCH, store=store, folds=Folds.of(windows_NL, sources_N))
    return Decoder(pruned.skeleton, layers.__getitem__, placement=pruned.placement)
