"""More samples of the same tasks: how many a verdict needs, and earlier answers joined with further ones.

Asking a task's first N documents, and later the next ones, gives what asking all at once gives, where no question
depends on those before it and the metric is a mean over documents. Other tasks are asked from the first document again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from llmprune.common.errors import RecipeError
from llmprune.evaluation.lm_eval.results import TaskResult
from llmprune.results.evaluation_figures import GateFigures


def samples_to_ask(
    gate: GateFigures | None, limit: int | None, *, documents: Sequence[int | None], wanted: int | None
) -> int:
    """Return how many samples a task another evaluation asks; ``limit`` is what the last one asked.

    ``documents``: how many each task has. Without ``wanted`` the gate says how many would tell. Raises RecipeError
    where there are no more documents, or where more samples are of no use.
    """
    most = max((count for count in documents if count is not None), default=None)
    if limit is None or (most is not None and limit >= most):
        raise RecipeError(
            "every document of the tasks was asked already; judge by further tasks (evaluation.tasks), or prune less"
        )
    if wanted is not None and wanted <= limit:
        raise RecipeError(f"--limit {wanted}: {limit} samples a task were asked already; ask for more")
    found = wanted or _needed(gate, limit)
    return found if most is None else min(found, most)


def _needed(gate: GateFigures | None, limit: int) -> int:
    undecided = [bar for bar in (gate.bars if gate else ()) if bar.verdict == "not enough samples"]
    if not undecided:
        raise RecipeError("the gate is not short of samples; give --limit to evaluate more all the same")
    needed = [bar.samples_needed / bar.samples for bar in undecided if bar.samples_needed]
    if len(needed) < len(undecided):
        raise RecipeError(
            "no number of samples in reach would decide the gate, for the retention lies on its bar; give --limit to "
            "evaluate more all the same"
        )
    return math.ceil(limit * max(needed))


def can_continue(task: Any, before: TaskResult) -> bool:
    """Whether the answers to further documents can be joined with these."""
    from lm_eval.api.metrics import mean

    # Examples are drawn one document after the other; sampled text depends on all that was sampled before.
    independent = not task.get_config("num_fewshot") and not (task.get_config("generation_kwargs") or {}).get(
        "do_sample"
    )
    values = [sample.value for sample in before.samples if sample.value is not None]
    return (
        independent
        and task.aggregation().get(before.metric) is mean
        and [sample.doc_id for sample in before.samples] == list(range(len(before.samples)))
        and len(values) == len(before.samples)
        and math.isclose(fmean(values), before.value, rel_tol=1e-6, abs_tol=1e-9)
    )


def joined(task: Any, before: TaskResult, *, more: TaskResult) -> TaskResult:
    """Return the results of both parts as one."""
    from lm_eval.api.metrics import mean

    counts = len(before.samples), len(more.samples)
    samples = before.samples + more.samples
    means = {
        name: (counts[0] * value + counts[1] * more.values[name]) / sum(counts)
        for name, value in before.values.items()
        if name in more.values and task.aggregation().get(name.partition(",")[0]) is mean
    }
    value = fmean(sample.value for sample in samples if sample.value is not None)
    return more.model_copy(
        update={"samples": samples, "value": value, "values": means, "answers": before.answers or more.answers}
    )
