"""The number of tokens that a recipe's vocabulary keeps, and the plan with it, once it is known."""

from __future__ import annotations

from llmprune.planning.checks import ErrorCollector
from llmprune.planning.next_tools.lost_tools import with_tokens_kept
from llmprune.planning.plan_schema import Plan
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.planning.vocabulary.choice import with_tokens
from llmprune.planning.vocabulary.plan import cut_size


def counted_tokens(inputs: TextInputs, errors: ErrorCollector, *, whole: bool) -> int | None:
    """Return the number of tokens kept; None where all are, and where their text is not counted.

    ``whole``: count it however long it is, unless a check has failed.
    """
    if inputs.recipe.vocabulary is None:
        return None
    if whole and not errors.found:
        errors.attempt("vocabulary", ("vocabulary", "model"), work=lambda: inputs.vocabulary)
    chosen = inputs.counted_vocabulary
    return None if chosen is None else len(chosen.keep_K)


def with_vocabulary(plan: Plan, inputs: TextInputs) -> Plan:
    """Return the plan with the number of tokens kept, where the recipe gives it or the text is counted already."""
    vocabulary, chosen = plan.vocabulary, inputs.counted_vocabulary
    if vocabulary is None or plan.pruned.vocabulary is not None:
        return plan
    vocabulary = vocabulary if chosen is None else with_tokens(vocabulary, chosen)
    dense, pruned = plan.dense.model_copy(update={"vocabulary": vocabulary.tokens}), cut_size(plan.pruned, vocabulary)
    update = {"dense": dense, "pruned": pruned, "disk": pruned.bytes, "vocabulary": vocabulary}
    return with_tokens_kept(plan.model_copy(update=update), vocabulary)
