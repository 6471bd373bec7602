"""Scores of a tiny model's neurons, and recipes that ask for them: what the tests of width criteria share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.loading import dense_decoder
from llmprune.criteria.base import WidthCriterion
from llmprune.layerwise.hidden_states import HiddenStateCache, HiddenStateStore
from llmprune.recipe.recipe import Recipe
from llmprune.score.forward_pass import score
from llmprune.testing import VOCABULARY

IDS = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(0))


def store_in(folder: Path) -> HiddenStateStore:
    """Room for what the walk leaves behind."""
    return HiddenStateStore(None, folder, HiddenStateCache(folder / "trail", "key"))


def scores_of(model: Any, criterion: WidthCriterion, folder: Path, batch_size: int = 4) -> dict[str, Tensor]:
    """Scores by IDS, for each unit."""
    anatomy = discover(model.config)
    return score(
        dense_decoder(model),
        anatomy,
        windows_NL=IDS,
        batch_size=batch_size,
        depth=None,
        width=criterion,
        store=store_in(folder),
    ).neurons


def recipe_of(model: str | Path, width: dict[str, Any], **calibration: Any) -> Recipe:
    """Two windows of 24 tokens, and this width."""
    text = {"dataset": "text.txt", "samples": 2, "sequence_length": 24, **calibration}
    return Recipe.parse(f"model: {{id: '{model}'}}\ncalibration: {_yaml(text)}\nwidth: {_yaml(width)}\n")


def _yaml(values: dict[str, Any]) -> str:
    pairs = (f"{key}: {_yaml(value) if isinstance(value, dict) else value}" for key, value in values.items())
    return "{" + ", ".join(pairs) + "}"
