"""From the result of a search to the run of the shape that it chose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmprune.common.errors import ModelError
from llmprune.pipeline.batches import Batches
from llmprune.pipeline.context import RunContext, Search
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.search.figures import shape_of_tried
from llmprune.pipeline.search.shapes import search_shapes, search_space_of
from llmprune.pipeline.self_generated import add_self_generated
from llmprune.planning.budget.settle import settled
from llmprune.planning.checks import ErrorCollector
from llmprune.planning.plan import PlanningOutcome, plan_structure
from llmprune.planning.vocabulary.counted import with_vocabulary
from llmprune.publish.generated_windows import GENERATED
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.run_folder.products import GENERATED_WINDOWS


def search_of_run(context: RunContext, *, generated: Path | None, known: SearchFigures | None) -> Search:
    """Add the windows that the dense model writes and search the shapes of an open recipe.

    ``generated``: file of the windows of a published run, which are taken in place of new ones; ``known``: figures of
    its search, whose choice is taken.
    """
    add_self_generated(context, generated)
    context.batches.settle(context.recipe, context.folder, sizes=context.plan.batch_sizes)
    return search_shapes(context, search_space_of(context), known=known)


def chosen_shape(search: Search) -> TriedShape:
    """Return the shape that a search chose for the budget of this run."""
    return found_of(search).chosen_shape(search.member)


def found_of(search: Search) -> SearchFigures:
    """Return the figures of a search that is done."""
    assert search.figures is not None, "the search is done"
    return search.figures


def generated_for_search(context: RunContext) -> dict[str, Path]:
    """Return the file of the windows that the dense model wrote for a search, by its name when published."""
    return {GENERATED: context.folder.path / GENERATED_WINDOWS} if context.recipe.calibration.generated else {}


def plan_of_chosen_shape(context: RunContext, search: Search, *, recipe: Recipe) -> PlanningOutcome:
    """Return the plan of an open recipe settled to the shape that the search chose for it."""
    chosen, anatomy, text = chosen_shape(search), context.inputs.anatomy, context.inputs.texts
    shape = shape_of_tried(found_of(search), chosen)
    recipe = settled(recipe, shape, anatomy=anatomy, removed=chosen.removed)
    errors = ErrorCollector()
    plan, anatomy_again = plan_structure(recipe, errors)
    own = text.of_round(recipe, text.part)
    return PlanningOutcome(plan and with_vocabulary(plan, own), anatomy_again, own, errors)


def settled_context(context: RunContext, search: Search) -> RunContext:
    """Return the context of the rest of the run, for the only budget of its recipe.

    Raises LLMPruneError: the plan before the search was that of another shape.
    """
    outcome = plan_of_chosen_shape(context, search, recipe=context.recipe)
    (plan, anatomy), text = outcome.require(), outcome.texts
    if plan.shortage:
        raise ModelError(plan.shortage)
    inputs = RunInputs(text.recipe, anatomy, texts=text, reserve=context.inputs.reserve, devices=plan.devices)
    return replace(
        context,
        recipe=text.recipe,
        plan=plan,
        inputs=inputs,
        batches=Batches.planned(plan.batch_sizes),
        search=search,
    )
