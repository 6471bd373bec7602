"""Chain of the models that a pruned model was made from, as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmprune.results.figures.lineage import Ancestor
from llmprune.results.formatting import count, percent


def describe_lineage(
    lineage: Sequence[Ancestor],
    parameters: int | None = None,
    *,
    name: Callable[[Ancestor], str] = lambda one: one.name,
) -> str | None:
    """Return the chain of models from the first base on, each with its size relative to it; None for one model.

    ``parameters``: of the result, where it is known; ``name``: returns the name to show.
    """
    if len(lineage) < 2:
        return None
    first = lineage[0]

    def size(parameters: int) -> str:
        return f"{count(parameters)} parameters, {percent(parameters / first.parameters)}"

    chain = [f"{name(first)} ({count(first.parameters)} parameters)"]
    chain += [f"{name(one)} ({size(one.parameters)})" for one in lineage[1:]]
    chain += [f"this model ({size(parameters)})"] if parameters is not None else []
    return f"pruned from a model that was pruned before: {' → '.join(chain)}"
