"""Waits for devices, and copies: none that grows with the calibration text, but asynchronous ones of hidden states.

A step runs over 8 windows and over three times the same, in batches of 2, on a model whose layers alternate between two
simulated GPUs. A line that waited once a batch would do so 8 times more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.anatomies import anatomy_of
from helpers.devices import CopyKind, simulated_devices
from helpers.placements import alternating
from helpers.scored import store_in
from torch import Tensor

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.depth.angular import Angular
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.criteria.depth.residual import Residual
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.criteria.width.flap import Flap
from llmprune.criteria.width.obs import Obs
from llmprune.criteria.width.share_taylor import ShareTaylor
from llmprune.criteria.width.taylor import Taylor
from llmprune.cut.apply import cut_decoder
from llmprune.evaluation.perplexity import compare_predictions
from llmprune.layerwise.decoder import Decoder
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.model import ModelSource
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

BATCH = 2
BEGIN = 1  # the begin-of-text token, also within windows
FEW = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
FEW[:, 0] = FEW[:, 6] = BEGIN
MANY = FEW.repeat(3, 1)
MORE_BATCHES = (len(MANY) - len(FEW)) // BATCH
# Waits where a model's own forward runs for its embeddings or head: transformers looks for packed sequences, and the
# arguments of layers are compared with those of the first batch.
OUTSIDE_LAYERS = ("layerwise/layer_calls.py:", "layerwise/shared_values.py:")
MOST_OUTSIDE_LAYERS = 6  # of one line, for each batch
# The host waits for none of these.
OVERLAPPED = {CopyKind.TO_DEVICE, CopyKind.TO_HOST, CopyKind.BETWEEN}


def _score(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
    criteria = ScoringCriteria(depth=BlockInfluence(), width=Flap(), heads=Activation())
    score(dense, anatomy_of(dense), criteria=criteria, calibration=CalibrationBatches(windows_NL, BATCH))


def _score_by_gram(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
    criteria = ScoringCriteria(depth=Angular(), width=Obs(), heads=Obs())
    score(dense, anatomy_of(dense), criteria=criteria, calibration=CalibrationBatches(windows_NL, BATCH))


def _score_by_gradients(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
    calibration = CalibrationBatches(windows_NL, BATCH, store_in(folder), (BEGIN,))
    criteria = ScoringCriteria(width=ShareTaylor(), heads=Taylor())
    score(dense, anatomy_of(dense), criteria=criteria, calibration=calibration)


def _ablate(dense: Decoder, windows_NL: Tensor, criterion: AblationCriterion) -> None:
    calibration = CalibrationBatches(windows_NL, BATCH, begin=(BEGIN,))
    layer_ablation_scores(dense, anatomy_of(dense), criterion=criterion, calibration=calibration, target=DepthTarget(1))


def _ablate_all(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
    _ablate(dense, windows_NL, Perplexity(windows=len(windows_NL)))


def _ablate_and_repair(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
    _ablate(dense, windows_NL, Residual(windows=len(windows_NL) // 2))


def _prune(
    dense: Decoder, windows_NL: Tensor, folder: Path, sparsity: Sparsity | None = None, ridge: float | None = None
) -> None:
    anatomy = anatomy_of(dense)
    criteria = ScoringCriteria(depth=BlockInfluence(), width=Activation(), heads=Activation())
    scores = score(dense, anatomy, criteria=criteria, calibration=CalibrationBatches(FEW[:2], BATCH))
    sizes = PlannedSizes((2,), 3, widths=dict.fromkeys(anatomy.widths, 64), kv_groups=1)
    cut = choose_cut(anatomy, scores, sizes=sizes)
    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    pruning = Pruning(
        dense,
        pruned,
        anatomy=anatomy,
        cut=cut,
        refit=Refit(up=True, ridge=ridge),
        write=lambda *_: None,
        sparsity=sparsity,
    )
    pruning.run(windows_NL, BATCH)


def _prune_to_zeros(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
    _prune(dense, windows_NL, folder, Sparsity(pattern="2:4"), ridge=0.1)  # a search takes steps that vary


def _evaluate(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
    compare_predictions(dense, dense, windows_NL=windows_NL, batch_size=BATCH)


STEPS = [
    _score,
    _score_by_gram,
    _score_by_gradients,
    _ablate_all,
    _ablate_and_repair,
    _prune,
    _prune_to_zeros,
    _evaluate,
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__.strip("_"))
def test_waits_and_copies_do_not_grow_with_the_text(step: Callable[..., None], llama: Path, tmp_path: Path) -> None:
    """No line of llmprune waits, or blocks in a copy, once for every batch of a layer.

    Iterative solvers may take a few steps more.
    """
    (few_waits, few_copies), (waits, copies) = (
        _counted(step, llama, windows_NL, tmp_path / str(len(windows_NL))) for windows_NL in (FEW, MANY)
    )
    grown = waits - few_waits
    outside = {line: count for line, count in grown.items() if line.startswith(OUTSIDE_LAYERS)}
    in_layers = {line: count for line, count in grown.items() if count >= MORE_BATCHES and line not in outside}
    blocking = {key: count for key, count in (copies - few_copies).items() if key[0] not in OVERLAPPED}
    assert not in_layers
    assert max(outside.values()) <= MOST_OUTSIDE_LAYERS * MORE_BATCHES
    assert not {key: count for key, count in blocking.items() if count >= MORE_BATCHES}


def test_the_host_waits_for_the_routing_once_a_batch(mixtral: Path, tmp_path: Path) -> None:
    """Outputs of all experts take one run of their block: the host waits for the numbers of their tokens alone."""

    def score_experts(dense: Decoder, windows_NL: Tensor, folder: Path) -> None:
        calibration = CalibrationBatches(windows_NL, BATCH)
        score(dense, anatomy_of(dense), criteria=ScoringCriteria(experts=Reap()), calibration=calibration)

    few, many = (
        _counted(score_experts, mixtral, windows_NL, tmp_path / str(len(windows_NL)))[0] for windows_NL in (FEW, MANY)
    )
    grown = {line: count for line, count in (many - few).items() if not line.startswith(OUTSIDE_LAYERS)}
    assert set(grown.values()) == {4 * MORE_BATCHES}  # in each of four layers
    assert len(grown) <= 2  # the other one is a histogram in transformers, on which CUDA does not wait


def _counted(
    step: Callable[..., None], model: Path, windows_NL: Tensor, folder: Path
) -> tuple[Counter[str], Counter[tuple[CopyKind, str]]]:
    """Waits and copies of a step by line."""
    folder.mkdir()
    with simulated_devices(2) as devices:
        dense = open_decoder(ModelSource(id=str(model), device_map=alternating(model)))
        devices.waits.clear()
        devices.copies.clear()
        step(dense, windows_NL, folder)
        return Counter(devices.waits), Counter(devices.copies)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A tiny Mixtral on disk."""
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"
