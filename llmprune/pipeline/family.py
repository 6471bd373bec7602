"""Runs of a family: one model for each budget of a recipe, all of one scoring pass and one search.

Each member is a run of its own in ``members/N`` of the run folder, the largest first, with the recipe that would make
it alone. A family that is stopped continues within a member.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from llmprune.common.distributed import is_first_process
from llmprune.common.errors import ModelError
from llmprune.common.progress import more_runs_follow, report_progress
from llmprune.pipeline.context import RunContext, Search
from llmprune.pipeline.finish import FinishedRun
from llmprune.pipeline.search.settle import found_of, generated_for_search, plan_of_chosen_shape
from llmprune.pipeline.search.shapes import search_space_of
from llmprune.planning.budget.limits import value_of_member
from llmprune.planning.budget.space import SearchSpace
from llmprune.planning.plan import PlanningOutcome
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder.products import MEMBERS
from llmprune.results.run_folder.replacing import remove


class RunMember(Protocol):
    """Function that runs one member."""

    def __call__(
        self, outcome: PlanningOutcome, output: Path, *, asked: Recipe, generated: Mapping[str, Path], search: Search
    ) -> FinishedRun:
        """Run a member in its folder. ``asked``: the recipe that makes it alone; ``generated``: files of windows."""
        ...


def run_family(context: RunContext, search: Search, *, run: RunMember) -> tuple[FinishedRun, ...]:
    """Run every member of a family, the largest first, and return them. Raises what a run raises."""
    folder = context.folder.home / MEMBERS
    generated, space = generated_for_search(context), search_space_of(context)
    count = len(found_of(search).chosen)
    finished = []
    for number in range(count):
        own = replace(search, member=number)
        asked = recipe_of_member(context.recipe, own, space=space)
        outcome = plan_of_chosen_shape(context, own, recipe=asked)
        plan = outcome.require(f"member {number + 1}")[0]
        if plan.shortage:
            raise ModelError(f"member {number + 1} of {count}: {plan.shortage}")
        report_progress(f"member {number + 1} of {count}")
        output = folder / str(number + 1)
        if is_first_process():
            output.mkdir(parents=True, exist_ok=True)
        with more_runs_follow(number + 1 < count):
            finished.append(run(outcome, output, asked=asked, generated=generated, search=own))
    if is_first_process():
        for left in folder.iterdir():
            if left.name.isdecimal() and int(left.name) > count:
                remove(left)
    return tuple(finished)


def recipe_of_member(recipe: Recipe, search: Search, *, space: SearchSpace) -> Recipe:
    """Return the open recipe that makes a member alone: one value in place of the list in its budget."""
    budget, limits = space.budget, found_of(search).chosen[search.member].limits
    assert budget.family is not None, "a family has one limit that is a list"
    value = value_of_member(budget, limits, dense=space.dense_sizes)
    return recipe.derived({"budget": budget.model_copy(update={budget.family: value})})
