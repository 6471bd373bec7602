"""What a cut leaves alone in a layer is run once: with the same result to the bit, and fewer runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.families import DEPTH_AND_WIDTH, KEPT_WIDTHS, MIXTURES

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.loading import dense_decoder
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_decoder
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.hidden_states import HiddenStateStore
from llmprune.layerwise.staged_layer import Order
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
LAST = 3  # as a layer of the pruned model, behind a gap


def _prune(
    family: str, up: bool = False, heads: bool = False, store: HiddenStateStore | None = None, narrow: bool = True
) -> tuple[Tensors, list[int]]:
    """The tensors of a model with narrower MLPs and without a layer, and how often its last layer's mixer ran."""
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
    pruned = cut_decoder(dense, model, anatomy=anatomy, cut=cut)
    written: Tensors = {}

    def write(index: int, tensors: Tensors) -> None:
        written.update({f"{index}.{name}": tensor.clone() for name, tensor in tensors.items()})

    runs: list[int] = []
    if family == "llama":
        for layer in (dense.layers[cut.layers[LAST]], pruned.layers[LAST]):
            layer.self_attn.o_proj.register_forward_hook(lambda *_: runs.append(1))
    Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(up=up), write=write).run(IDS, 2, store=store)
    return written, runs


def _all_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Order, "before", lambda *_: {})


@pytest.mark.parametrize(
    ("family", "up"),
    [*((family, False) for family in DEPTH_AND_WIDTH + MIXTURES), ("llama", True), ("gemma2", True), ("phi3", True)],
)
def test_the_result_is_the_same(family: str, up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every family, whatever else its layers do beside attention and MLP."""
    once, _ = _prune(family, up)
    _all_run_again(monkeypatch)
    again, _ = _prune(family, up)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("family", ["gpt_neox", *MIXTURES])
def test_the_result_is_the_same_without_narrower_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers go and experts stay whole, behind a gap as well."""
    once, _ = _prune(family, narrow=False)
    _all_run_again(monkeypatch)
    again, _ = _prune(family, narrow=False)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_attention_runs_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again with the layer's cut MLP, nor while its up projection is solved; not less where heads go."""
    once = [len(_prune("llama", up)[1]) for up in (False, True)]
    whole = len(_prune("llama", heads=True)[1])
    _all_run_again(monkeypatch)
    again = [len(_prune("llama", up)[1]) for up in (False, True)]
    assert [before - now for before, now in zip(again, once, strict=True)] == [2, 4]  # of two batches
    assert whole == len(_prune("llama", heads=True)[1])


def test_files_hold_what_memory_does(tmp_path: Path) -> None:
    """What modules put out lies in a file where memory is short."""
    in_memory, _ = _prune("llama")
    in_files, _ = _prune("llama", store=HiddenStateStore(1, tmp_path))
    assert all(torch.equal(in_memory[name], in_files[name]) for name in in_memory)
