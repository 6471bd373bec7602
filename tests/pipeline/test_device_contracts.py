"""Every criterion and method on two devices, the CPU and the disk: the results of the CPU to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.anatomies import anatomy_of
from helpers.devices import simulated_devices
from helpers.placements import spread
from helpers.scored import store_in
from torch import Tensor

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.base import ExpertCriterion, HiddenStateCriterion, WidthCriterion
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.evaluation.perplexity import compare_predictions, perplexity
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.prune.pass2 import Pruning
from llmprune.prune.snapshots import Snapshots
from llmprune.recipe.model import ModelSource
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.sparsity.method import SparsityMethod
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))
Work = Callable[[Decoder, Path], Iterator[Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and a tiny Mixtral on disk."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        tiny_model(family).save_pretrained(root / family)
    return root


def _require_equal(work: Work, model: Path, folder: Path) -> None:
    """Work on the CPU and on two devices, and compare all tensors."""
    on_cpu = list(work(_open(model, "cpu"), folder / "cpu"))
    with simulated_devices(2):
        found = [tensor.cpu() for tensor in work(_open(model, spread(model)), folder / "devices")]
    assert len(found) == len(on_cpu) > 0
    assert all(map(torch.equal, found, on_cpu))


def _open(model: Path, device_map: Any) -> Decoder:
    return open_decoder(ModelSource(id=str(model), device_map=device_map))


def _scores(dense: Decoder, folder: Path, criteria: ScoringCriteria) -> Iterator[Tensor]:
    folder.mkdir()
    calibration, target = CalibrationBatches(IDS, 2, store_in(folder)), DepthTarget(2)
    found = score(dense, anatomy_of(dense), criteria=criteria, calibration=calibration, target=target)
    for values in (found.neurons, found.heads, found.experts, found.routed):
        assert not any(value.is_cuda for value in values.values())  # they are chosen from on the CPU
        yield from values.values()
    if found.layers is not None:
        yield found.layers


@pytest.mark.parametrize("kind", WidthCriterion.kinds(), ids=lambda kind: kind.__name__)
def test_neurons_and_heads_are_scored(kind: type[WidthCriterion], models: Path, tmp_path: Path) -> None:
    """By every criterion, with gradients too."""
    criteria = ScoringCriteria(width=kind(), heads=kind())
    _require_equal(partial(_scores, criteria=criteria), models / "llama", tmp_path)


@pytest.mark.parametrize("kind", HiddenStateCriterion.kinds(), ids=lambda kind: kind.__name__)
def test_layers_are_scored(kind: type[HiddenStateCriterion], models: Path, tmp_path: Path) -> None:
    """By every criterion of hidden states."""
    _require_equal(partial(_scores, criteria=ScoringCriteria(depth=kind())), models / "llama", tmp_path)


@pytest.mark.parametrize("kind", ExpertCriterion.kinds(), ids=lambda kind: kind.__name__)
def test_experts_and_their_neurons_are_scored(kind: type[ExpertCriterion], models: Path, tmp_path: Path) -> None:
    """By every criterion of experts."""
    criteria = ScoringCriteria(width=Activation(), experts=kind())
    _require_equal(partial(_scores, criteria=criteria), models / "mixtral", tmp_path)


@pytest.mark.parametrize("kind", AblationCriterion.kinds(), ids=lambda kind: kind.__name__)
def test_layers_are_ablated(kind: type[AblationCriterion], models: Path, tmp_path: Path) -> None:
    """With and without a repair of the layer before."""

    def ablate(dense: Decoder, folder: Path) -> Iterator[Tensor]:
        yield layer_ablation_scores(
            dense,
            anatomy_of(dense),
            criterion=kind(windows=2),
            calibration=CalibrationBatches(IDS, 2),
            target=DepthTarget(2),
        )

    _require_equal(ablate, models / "llama", tmp_path)


def _pruned(
    dense: Decoder,
    folder: Path,
    *,
    sparsity: Sparsity | None = None,
    snapshots: Snapshots | None = None,
    stop_at: int | None = None,
) -> Iterator[Tensor]:
    """Layers and logits of a model with two layers fewer, half the neurons and heads; stop before one layer."""
    anatomy = anatomy_of(dense)
    criteria = ScoringCriteria(depth=BlockInfluence(), width=Activation(), heads=Activation())
    scores = score(dense, anatomy, criteria=criteria, calibration=CalibrationBatches(IDS, 2))
    sizes = PlannedSizes((2,), 3, widths=dict.fromkeys(anatomy.widths, 64), kv_groups=1)
    cut: Cut = choose_cut(anatomy, scores, sizes=sizes)
    written: dict[int, Tensors] = {}

    def write(index: int, layer: Tensors) -> None:
        if index == stop_at:
            raise _StoppedError
        written[index] = layer

    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    pruning = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(up=True), write=write, sparsity=sparsity)
    _, forward = pruning.run(IDS, 2, snapshots=snapshots)
    yield forward.logits(0)
    for index in (1, 2):  # the first ones may be those of a stopped run
        yield from written[index].values()


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", SparsityMethod.kinds(), ids=lambda kind: kind.__name__)
def test_matrices_are_made_sparse(kind: type[SparsityMethod], models: Path, tmp_path: Path) -> None:
    """By every method, after a cut of layers, neurons and heads, in two rounds with a refit."""
    sparsity = Sparsity(pattern=0.5, rounds=2, method=kind(refit=True))
    _require_equal(partial(_pruned, sparsity=sparsity), models / "llama", tmp_path)


def test_pass_2_continues_from_a_snapshot(models: Path, tmp_path: Path) -> None:
    """A run that was stopped and continued on devices ends as one on the CPU."""

    def prune(dense: Decoder, folder: Path) -> Iterator[Tensor]:
        if dense.device.type == "cuda":
            snapshots = [Snapshots(folder, "same", share=1e9) for _ in range(2)]
            with pytest.raises(_StoppedError):
                list(_pruned(dense, folder, snapshots=snapshots[0], stop_at=1))
            return _pruned(dense, folder, snapshots=snapshots[1])
        return _pruned(dense, folder)

    _require_equal(prune, models / "llama", tmp_path)


def test_predictions_are_compared(models: Path, tmp_path: Path) -> None:
    """Perplexity and divergence of a model and of the same without a layer."""

    def evaluate(dense: Decoder, folder: Path) -> Iterator[Tensor]:
        pruned = cut_decoder(dense, anatomy=anatomy_of(dense), cut=Cut(4, (0, 1, 3)))
        found = compare_predictions(dense, pruned, windows_NL=IDS, batch_size=2)
        yield torch.tensor([found.dense_perplexity, found.pruned_perplexity, found.divergence.mean])
        yield torch.tensor(perplexity(pruned, IDS, batch_size=2, name="pruned"))

    _require_equal(evaluate, models / "llama", tmp_path)
