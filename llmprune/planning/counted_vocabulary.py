"""A plan with the number of tokens that its vocabulary keeps, once that is known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llmprune.planning.vocabulary import cut_size, with_tokens

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan, PlanningOutcome
    from llmprune.planning.text_inputs import TextInputs


def count_vocabulary(found: PlanningOutcome) -> PlanningOutcome:
    """Return a plan whose vocabulary is counted, as a run needs it, however long its text is."""
    inputs, errors = found.inputs, found.errors
    if found.plan is None or errors.found or inputs.recipe.vocabulary is None:
        return found
    errors.attempt("vocabulary", ("vocabulary", "model"), work=lambda: inputs.vocabulary)
    return found if errors.found else replace(found, plan=with_vocabulary(found.plan, inputs))


def with_vocabulary(plan: Plan, inputs: TextInputs) -> Plan:
    """Return the plan with the number of tokens kept, where the recipe gives it or the text is counted already."""
    vocabulary, chosen = plan.vocabulary, inputs.counted_vocabulary
    if vocabulary is None or plan.pruned.vocabulary is not None:
        return plan
    vocabulary = vocabulary if chosen is None else with_tokens(vocabulary, chosen)
    dense, pruned = plan.dense.model_copy(update={"vocabulary": vocabulary.tokens}), cut_size(plan.pruned, vocabulary)
    return plan.model_copy(update={"dense": dense, "pruned": pruned, "disk": pruned.bytes, "vocabulary": vocabulary})
