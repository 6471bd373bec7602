"""Statistics do not see the begin-of-text token: a contract of every criterion, repair and measurement.

Windows that end with that token give what the same windows give without it: no other token attends to the last one. Its
embedding is a thousand times larger than others, so that a sum with it in would be another.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import store_in
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.criteria.base import AblationCriterion, DepthCriterion, HiddenStateCriterion, WidthCriterion
from llmprune.criteria.experts.reap import Reap
from llmprune.cut.apply import cut_decoder
from llmprune.evaluation.perplexity import compare_predictions
from llmprune.layerwise.decoder import Tensors
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_model

BEGIN = 1
WITHOUT = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
WITH = torch.cat([WITHOUT, torch.full((8, 1), BEGIN)], dim=1)
CLOSE = {"rtol": 2e-3, "atol": 1e-6}

WIDTH = {kind.model_fields["kind"].default: kind for kind in WidthCriterion.kinds()}
DEPTH = {kind.model_fields["kind"].default: kind for kind in DepthCriterion.kinds()}


def _model(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family)
    model.get_input_embeddings().weight.data[BEGIN] *= 1e3
    return model


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _batches(windows_NL: Tensor, folder: Path, batch_size: int = 4) -> CalibrationBatches:
    begin = (BEGIN,) if windows_NL is WITH else ()
    return CalibrationBatches(windows_NL, batch_size, store_in(_made(folder)), begin)


def _score(model: PreTrainedModel, windows_NL: Tensor, folder: Path, batch_size: int = 4, **criteria: Any) -> Scores:
    calibration = _batches(windows_NL, folder / str(windows_NL.shape[1]), batch_size)
    return score(
        dense_decoder(model), discover(model.config), criteria=ScoringCriteria(**criteria), calibration=calibration
    )


def _shares(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scores without their common factor: ``taylor`` divides by the number of all positions."""
    return {key: values / values.mean() for key, values in scores.items()}


@pytest.mark.parametrize("kind", WIDTH)
def test_neurons_and_heads(kind: str, tmp_path: Path) -> None:
    """Scores of neurons and of key-value groups are those of the text alone."""
    criteria: dict[str, Any] = {"width": WIDTH[kind](), "heads": WIDTH[kind]()}
    with_token, without = (_score(_model(), windows_NL, tmp_path, **criteria) for windows_NL in (WITH, WITHOUT))
    torch.testing.assert_close(_shares(with_token.neurons), _shares(without.neurons), **CLOSE)
    torch.testing.assert_close(_shares(with_token.heads), _shares(without.heads), **CLOSE)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_experts_and_their_neurons(family: str, tmp_path: Path) -> None:
    """Neither the scores of experts nor the tokens that are routed to them count it."""
    criteria: dict[str, Any] = {"width": WIDTH["activation"]()}
    if family == "mixtral":
        criteria["experts"] = Reap()
    with_token, without = (_score(_model(family), windows_NL, tmp_path, **criteria) for windows_NL in (WITH, WITHOUT))
    torch.testing.assert_close(asdict(with_token), asdict(without), **CLOSE)


@pytest.mark.parametrize("kind", DEPTH)
def test_layers(kind: str, tmp_path: Path) -> None:
    """Scores of layers, of all tokens of a window, are those of the text alone."""
    model, target = _model(), DepthTarget(2)
    criterion = DEPTH[kind](tokens="all") if kind == "angular" else DEPTH[kind]()
    found = []
    for windows_NL in (WITH, WITHOUT):
        calibration, dense = _batches(windows_NL, tmp_path / str(windows_NL.shape[1])), dense_decoder(model)
        anatomy = discover(model.config)
        if isinstance(criterion, HiddenStateCriterion):
            criteria = ScoringCriteria(depth=criterion)
            found.append(score(dense, anatomy, criteria=criteria, calibration=calibration, target=target).layers)
        else:
            assert isinstance(criterion, AblationCriterion)
            few = criterion.model_copy(update={"windows": 4, "refit_windows": 4, "ridge": 0.5})
            found.append(layer_ablation_scores(dense, anatomy, criterion=few, calibration=calibration, target=target))
    torch.testing.assert_close(*found, **CLOSE)


def _prune(windows_NL: Tensor, tmp_path: Path, **settings: Any) -> tuple[dict[int, Tensors], list[LayerRecord]]:
    model = _model()
    anatomy, dense = discover(model.config), dense_decoder(model)
    scores = _score(model, WITHOUT, tmp_path, width=WIDTH["activation"](), heads=WIDTH["activation"]())
    sizes = PlannedSizes((2,), 3, widths=dict.fromkeys(anatomy.widths, 64), kv_groups=1)
    cut = choose_cut(anatomy, scores, sizes=sizes)
    written: dict[int, Tensors] = {}
    pruning = Pruning(
        dense,
        cut_decoder(dense, anatomy=anatomy, cut=cut),
        anatomy=anatomy,
        cut=cut,
        write=written.__setitem__,
        begin=(BEGIN,) if windows_NL is WITH else (),
        **settings,
    )
    records, _ = pruning.run(windows_NL, 4, sources_N=torch.arange(8) % 2)
    return written, records


@pytest.mark.parametrize(
    "settings",
    [
        {"refit": Refit()},
        {"refit": Refit(up=True)},
        {"refit": Refit(), "sparsity": Sparsity(pattern="2:4")},
        {"refit": None, "sparsity": Sparsity(pattern="2:4")},
    ],
    ids=["refit", "up", "sparse and refit", "sparse"],
)
def test_repairs_and_sparsity(settings: dict[str, Any], tmp_path: Path) -> None:
    """Weights after every repair, the choices of its cross-validation, and reported errors are those of the text."""
    (with_token, its_records), (without, records) = (
        _prune(windows_NL, tmp_path, **settings) for windows_NL in (WITH, WITHOUT)
    )
    for index, tensors in without.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(with_token[index][name], tensor, rtol=1e-2, atol=1e-3, msg=f"{index} {name}")
    for its_record, record in zip(its_records, records, strict=True):
        for name, value in asdict(record).items():
            if isinstance(value, float):
                assert asdict(its_record)[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


def test_batches_and_processes_do_not_matter(tmp_path: Path) -> None:
    """Windows with the token at their begin and within have the same scores in batches of 1 and of 8."""
    windows_NL = WITHOUT.clone()
    windows_NL[:, 0] = windows_NL[3, 7] = BEGIN
    found = []
    for batch_size in (1, 8):
        calibration = CalibrationBatches(windows_NL, batch_size, store_in(_made(tmp_path / str(batch_size))), (BEGIN,))
        criteria = ScoringCriteria(depth=DEPTH["block_influence"](), width=WIDTH["share"]())
        model = _model()
        found.append(
            asdict(score(dense_decoder(model), discover(model.config), criteria=criteria, calibration=calibration))
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_held_out_predictions() -> None:
    """Perplexity and divergence are those of the text alone, and so is the number of tokens."""
    dense, other = dense_decoder(_model()), dense_decoder(tiny_model("llama", seed=1))
    with_token = compare_predictions(dense, other, windows_NL=WITH, batch_size=4, begin=(BEGIN,))
    without = compare_predictions(dense, other, windows_NL=WITHOUT, batch_size=4)
    assert with_token.divergence.tokens == without.divergence.tokens == WITHOUT[:, 1:].numel()
    assert math.isclose(with_token.dense_perplexity, without.dense_perplexity, rel_tol=1e-4)
    assert math.isclose(with_token.divergence.mean, without.divergence.mean, rel_tol=1e-4)
