"""Scores that jobs of a sweep share: one of them scores the model, and the others begin with its scores.

A job that is waiting for scores belongs to a group. Which one it waits for, and whose scores it takes, is decided when
jobs start (``supervisor/score_sharing.py``), so that a job that fails, is cancelled or is deleted holds up no other.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.recipe.recipe import Recipe
from llmprune.service.database.database import Database, Transaction

WAITS = "waits for the scores of job"  # begins the step of a job that waits for another one's scores


@dataclass(frozen=True)
class Member:
    """A job of a group."""

    id: str
    state: str


def key_of_scores(recipe: Recipe) -> str | None:
    """Return a text that is equal for recipes that need the same scores; None where none can be shared.

    Recipes with different keys may still need the same scores. Runs with equal keys compare the fingerprints of what
    the scores depend on before they reuse any.
    """
    rounds, family = recipe.recover is not None and recipe.recover.rounds > 1, recipe.budget and recipe.budget.family
    cuts = {name: found for name, found in _scored(recipe).items() if found}
    if rounds or family or not cuts:
        return None
    text = recipe.model_dump(mode="json", include={"model", "devices", "calibration", "vocabulary"})
    return hashlib.sha256(json.dumps([text, cuts], sort_keys=True).encode()).hexdigest()


def _scored(recipe: Recipe) -> Mapping[str, Any]:
    """Return what is scored and by which criteria, without the sizes."""
    budget, depth, width, experts = recipe.budget, recipe.depth, recipe.width, recipe.experts
    return {
        "budget": budget and budget.model_dump(mode="json", exclude=set(budget.limits)) | {"limits": [*budget.limits]},
        "layers": depth and depth.layers is None and [_dumped(depth.criterion), depth.keep_pattern, _horizon(recipe)],
        "neurons": width and width.cuts_mlp and _dumped(width.neuron_criterion),
        "heads": width and width.heads is not None and _dumped(width.head_criterion),
        "experts": experts and [_dumped(experts.criterion), experts.method],
        "hidden": recipe.hidden is not None,
    }


def _horizon(recipe: Recipe) -> list[int | None]:
    """Return the number of layers where scores of pass 1 depend on how many are removed."""
    depth = recipe.depth
    if depth is None or not depth.criterion.in_pass1 or depth.criterion.horizon(1) == depth.criterion.horizon(2):
        return []
    return [depth.remove, depth.keep]


def _dumped(criterion: Any) -> Any:
    return criterion.model_dump(mode="json")


def shared_keys(keys: Sequence[str | None]) -> dict[str, int]:
    """Return the keys that more than one job has, with the number of jobs."""
    return {key: number for key, number in Counter(keys).items() if key is not None and number > 1}


def write_group(connection: Transaction, job: str, *, group: str) -> None:
    """Add a job to a group, in a transaction."""
    connection.execute("INSERT INTO shared_scores (job, score_group) VALUES (?, ?)", (job, group))


def groups_that_wait(database: Database) -> dict[str, list[Member]]:
    """Return the groups of waiting jobs, each with all of its jobs in the order of arrival."""
    sql = (
        "SELECT s.score_group, j.id, j.state FROM shared_scores s JOIN jobs j ON j.id = s.job "
        "WHERE s.score_group IN (SELECT w.score_group FROM jobs q JOIN shared_scores w ON w.job = q.id "
        "WHERE q.state = 'queued') ORDER BY j.seq"
    )
    found: dict[str, list[Member]] = {}
    for row in database.read(sql):
        found.setdefault(row["score_group"], []).append(Member(row["id"], row["state"]))
    return found
