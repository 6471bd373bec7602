"""Depth criteria as sections of a recipe: kinds, dependence on the number of removed layers, and memory and time."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny import structure_of
from pydantic import TypeAdapter

from llmprune.criteria.base import DepthCriterion
from llmprune.criteria.depth.angular import Angular
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.criteria.depth.residual import Residual
from llmprune.planning.plan_schema import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.testing import tiny_model

LAYERS = 5


def plan_of(folder: Path, criterion: dict[str, object], **sections: object) -> Plan:
    """The plan that removes two of five layers by this criterion."""
    tiny_model("llama", num_hidden_layers=LAYERS).config.save_pretrained(folder)
    return structure_of(
        Recipe.model_validate(
            {
                "model": {"id": str(folder)},
                "calibration": {"dataset": "text.txt", "samples": 32, "sequence_length": 16, "self_generated": 0},
                "depth": {"remove": 2, "criterion": criterion},
            }
            | sections
        )
    )


def test_the_plan_counts_what_criteria_keep(tmp_path: Path) -> None:
    """For spans of layers the hidden states before each; for refits a second forward pass, and its time."""
    one, last, every, ablation, repaired = (
        plan_of(tmp_path, criterion)
        for criterion in (
            {"kind": "block_influence"},
            {"kind": "angular"},
            {"kind": "angular", "tokens": "all"},
            {"kind": "divergence", "windows": 8, "tokens": 8, "greedy": True},
            {"kind": "residual", "windows": 8, "refit_windows": 16},
        )
    )
    window = 16 * 32 * 4  # tokens, hidden size, bytes
    assert last.memory.hidden_states - one.memory.hidden_states == 2 * 32 * window // 16
    assert every.memory.hidden_states - one.memory.hidden_states == 2 * 32 * window
    assert ablation.memory.hidden_states - one.memory.hidden_states == (LAYERS + 2) * 8 * window // 2
    assert repaired.memory.hidden_states - one.memory.hidden_states >= ((LAYERS + 2) * 8 + 2 * 16) * window
    without_refit = plan_of(tmp_path, {"kind": "residual"}, refit=False).memory.statistics
    assert without_refit >= 4 * 96 * (2 * 96 + LAYERS * 32)  # sums, their factor, and a solution for each layer
    costs = [next(note for note in plan.notes if "depth.criterion" in note) for plan in (ablation, repaired)]
    rounds = 5 / 2 + 1 + 3 / 2 + 1  # of the three cheapest in the second
    spans = 4 * (3 / 2) / 5 + 3 / 5 + 2  # and the two layers that were chosen one by one, and the whole model twice
    cost = f"{(rounds + spans) * 8 / 32 / 2:.1f}"
    assert f"4 rounds of ablation on 8 windows of 8 tokens cost about {cost} forward" in costs[0]
    passes = (5 / 2 + 1 + 4 / 2 + 1) * 8 / 32 + (1 + 4 / 5) * 16 / 32
    assert f"cost about {passes:.1f} forward passes over the calibration tokens, and a refit" in costs[1]


def test_scores_depend_on_the_number_only_where_they_say_so() -> None:
    """A change of depth.remove keeps the scores of criteria that score layers one by one."""
    assert BlockInfluence().horizon(6) == Perplexity(greedy=False).horizon(6) == 1
    assert Angular().horizon(6) == Divergence().horizon(6) == Divergence(greedy=True, spans=False).horizon(6) == 6
    assert Divergence(spans=False).horizon(6) == Divergence().horizon(1) == 1


@pytest.mark.parametrize("kind", DepthCriterion.kinds())
def test_every_criterion_is_read_by_its_kind(kind: type[DepthCriterion]) -> None:
    """The kind that a recipe names picks the class."""
    assert type(TypeAdapter(DepthCriterion).validate_python({"kind": kind().kind})) is kind


@pytest.mark.parametrize(
    ("keys", "kind"),
    [({}, Divergence), ({"tokens": "all"}, Angular), ({"windows": 4}, Divergence), ({"ridge": 0.1}, Residual)],
)
def test_a_kind_that_is_left_out_is_the_first_with_all_keys(
    keys: dict[str, object], kind: type[DepthCriterion]
) -> None:
    """A depth criterion may be given by its keys alone."""
    assert type(TypeAdapter(DepthCriterion).validate_python(keys)) is kind
