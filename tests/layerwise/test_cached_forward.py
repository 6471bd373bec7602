"""Unchanged modules of a layer run once, and the cut unit's once: results are equal, and runs are fewer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.families import DISTINCT, KEPT_WIDTHS
from torch.testing import assert_close

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import Unit
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_decoder
from llmprune.layerwise.cached_forward import CachedForward
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.pass2 import Pruning
from llmprune.prune.repair.output_projection import OutputProjectionRefit
from llmprune.prune.repair.token_mixer import TokenMixerRefit
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
LAST = 3  # index in the pruned model, after a gap


class _WithoutReuse(Pruning):
    """Pass 2 that runs every module again in each run of a layer."""

    def _runs(self, run: Pass2Context, work: LayerWork) -> CachedForward:
        return CachedForward(run.pruned, {})


class _RunsBoth(OutputProjectionRefit):
    """Refit of the output projection that runs the cut layer beside the uncut one."""

    def runs_once(self, work: LayerWork, unit: Unit) -> bool:
        return False


def _prune(
    family: str,
    up: bool = False,
    heads: bool = False,
    store: HiddenStateStore | None = None,
    narrow: bool = True,
    pass_2: Callable[..., Pruning] = Pruning,
) -> tuple[Tensors, list[int]]:
    """Prune MLPs and a layer; return the written tensors, and one entry for each run of the last layer's mixer."""
    model = tiny_model(family, num_hidden_layers=5) if family == "llama" else tiny_model(family)
    anatomy, dense = discover(model.config), dense_decoder(model)
    scores = score(
        dense,
        anatomy,
        criteria=ScoringCriteria(width=Activation(), heads=Activation() if heads else None),
        calibration=CalibrationBatches(IDS, 2),
    )
    widths = {field: KEPT_WIDTHS[width] for field, width in anatomy.widths.items()}
    cut = choose_cut(
        anatomy,
        scores,
        sizes=PlannedSizes((1,), len(dense) - 1, widths=widths if narrow else {}, kv_groups=1 if heads else None),
    )
    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    written: Tensors = {}

    def write(index: int, tensors: Tensors) -> None:
        written.update({f"{index}.{name}": tensor.clone() for name, tensor in tensors.items()})

    runs: list[int] = []
    if family == "llama":
        for layer in (dense.layers[cut.layers[LAST]], pruned.layers[LAST]):
            layer.self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    pass_2(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(up=up), write=write).run(IDS, 2, store=store)
    return written, runs


@pytest.mark.parametrize(
    ("family", "up"),
    [*((family, False) for family in DISTINCT), ("llama", True), ("gemma2", True), ("phi3", True)],
)
def test_the_result_is_the_same(family: str, up: bool) -> None:
    """Weights are those of runs without reuse, up to rounding."""
    once, _ = _prune(family, up)
    again, _ = _prune(family, up, pass_2=_WithoutReuse)
    assert once.keys() == again.keys()
    assert_close(once, again)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "deepseek_v3", "qwen3_next", "nemotron_h"])
def test_the_result_is_the_same_without_narrower_layers(family: str) -> None:
    """The same holds where only layers are removed, after the gap too."""
    once, _ = _prune(family, narrow=False)
    again, _ = _prune(family, narrow=False, pass_2=_WithoutReuse)
    assert_close(once, again)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("narrow", [True, False])
def test_the_cut_layer_need_not_run_for_the_refit(family: str, narrow: bool) -> None:
    """The refit of the output projection from the uncut layer alone is that from both, up to rounding."""
    once, _ = _prune(family, narrow=narrow)
    both, _ = _prune(family, narrow=narrow, pass_2=partial(Pruning, repairs=(TokenMixerRefit(), _RunsBoth())))
    for name in once:
        assert_close(once[name], both[name], rtol=1e-3, atol=1e-4)


def test_attention_runs_less_often() -> None:
    """Attention is not run again once it is refit, neither for the MLP nor for its refits; with heads removed it is."""
    once = [len(_prune("llama", up)[1]) for up in (False, True)]
    whole = len(_prune("llama", heads=True)[1])
    again = [len(_prune("llama", up, pass_2=_WithoutReuse)[1]) for up in (False, True)]
    assert [before - now for before, now in zip(again, once, strict=True)] == [4, 6]  # of two batches
    assert whole == len(_prune("llama", heads=True, pass_2=_WithoutReuse)[1])


def test_files_hold_what_memory_does(tmp_path: Path) -> None:
    """Reused outputs may be in files."""
    in_memory, _ = _prune("llama")
    in_files, _ = _prune("llama", store=HiddenStateStore(1, tmp_path))
    assert all(torch.equal(in_memory[name], in_files[name]) for name in in_memory)
