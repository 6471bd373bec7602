"""Scores of tiny models by criteria, and recipes that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.decoders import dense_decoder
from llmprune.anatomy.discovery import discover
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.base import WidthCriterion
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.recipe.recipe import Recipe
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.testing import VOCABULARY

IDS = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(0))


def store_in(folder: Path) -> HiddenStateStore:
    """Store in memory with a cache of hidden states in a folder."""
    return HiddenStateStore(None, folder, HiddenStateCache(folder / "cache", "key"))


def scores_of(model: Any, criterion: WidthCriterion, folder: Path, batch_size: int = 4) -> dict[str, Tensor]:
    """Scores by IDS, for each unit."""
    anatomy = discover(model.config)
    return score(
        dense_decoder(model),
        anatomy,
        criteria=ScoringCriteria(width=criterion),
        calibration=CalibrationBatches(IDS, batch_size, store_in(folder)),
    ).neurons


def ablation_scores(
    model: Any, criterion: AblationCriterion, windows_NL: Tensor, *, remove: int, batch_size: int = 2, **given: Any
) -> Tensor:
    """Scores of the layers of a model by ablation; ``given``: another anatomy, or a store of hidden states."""
    return layer_ablation_scores(
        dense_decoder(model),
        given.pop("anatomy", None) or discover(model.config),
        criterion=criterion,
        calibration=CalibrationBatches(windows_NL, batch_size, **given),
        target=DepthTarget(remove),
    )


def recipe_of(model: str | Path, width: dict[str, Any], **calibration: Any) -> Recipe:
    """Recipe with two windows of 24 tokens and this width section."""
    text = {"dataset": "text.txt", "samples": 2, "sequence_length": 24, "self_generated": 0, **calibration}
    return Recipe.parse(f"model: {{id: '{model}'}}\ncalibration: {_yaml(text)}\nwidth: {_yaml(width)}\n")


def _yaml(values: dict[str, Any]) -> str:
    pairs = (f"{key}: {_yaml(value) if isinstance(value, dict) else value}" for key, value in values.items())
    return "{" + ", ".join(pairs) + "}"
