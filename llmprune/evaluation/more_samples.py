"""Extension of an evaluation by further samples: how many a verdict needs, and the union of both results.

Evaluating the first N documents of a task and later the next ones gives the result of evaluating all at once, if no
request depends on earlier documents and the metric is a mean over documents. Other tasks are evaluated again from the
first document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from llmprune.common.errors import RecipeError
from llmprune.evaluation.lm_eval.results import TaskResult
from llmprune.recipe.evaluation import Evaluation
from llmprune.results.figures.evaluation import GateFigures

Documents = Iterable[tuple[str, int | None]]  # task or group in the recipe, and the documents of one of its tasks


def next_limit(
    gate: GateFigures | None, evaluation: Evaluation, *, documents: Documents, wanted: int | None
) -> int | dict[str, int]:
    """Return ``evaluation.limit`` for the next evaluation: a number where the last one had one for all tasks.

    Otherwise these are numbers by task or group, for those that had a limit of their own. ``evaluation``: settings of
    the last one. ``wanted``: the least number for each task, chosen by the user; without it every limit grows by the
    factor that the gate's verdict needs. Raises RecipeError if all documents are evaluated already, if ``wanted`` is
    not more, or if more samples cannot decide the gate.
    """
    single = isinstance(evaluation.limit, int)
    documents = list(documents)
    names = dict.fromkeys((*evaluation.task_names, *(name for name, _ in documents)))
    limits = {name: limit for name in names if (limit := evaluation.limit_of(name)) is not None}
    counts = [(name, count) for name, count in documents if count is not None]
    most = {name: max((count for of, count in counts if single or of == name), default=math.inf) for name in limits}
    open_limits = {name: limit for name, limit in limits.items() if limit < most[name]}
    if not open_limits:
        raise RecipeError(
            "every document of the tasks is evaluated already; add tasks (evaluation.tasks), or prune less"
        )
    least = min(open_limits.values())
    if wanted is not None and wanted <= least:
        raise RecipeError(f"--limit {wanted}: {least} samples per task are evaluated already; give a larger number")
    factor = 1.0 if wanted is not None else _factor(gate)
    larger = {
        name: int(min(most[name], max(limit, wanted or math.ceil(limit * factor))))
        for name, limit in open_limits.items()
    }
    return max(larger.values()) if single else limits | larger


def with_tasks(evaluation: Evaluation, tasks: Iterable[str], *, limit: int | None) -> dict[str, Any]:
    """Return the keys of an evaluation section that change where tasks are added.

    ``limit``: maximum samples of each added task; None: as the section says for a task without a limit of its own.
    Raises RecipeError where no task is new.
    """
    added = [task for task in dict.fromkeys(tasks) if task not in evaluation.task_names]
    if not added:
        raise RecipeError(
            f"--tasks {', '.join(tasks)}: evaluated already; name other tasks, or give --limit alone for more samples"
        )
    changed: dict[str, Any] = {"tasks": [*evaluation.tasks, *added]}
    if limit is not None:
        own = {name: number for name, number in evaluation.limits.items() if number is not None}
        changed["limit"] = own | dict.fromkeys(added, limit)
    return changed


def _factor(gate: GateFigures | None) -> float:
    """Return how many times the samples of the last evaluation decide the gate."""
    undecided = [
        bar for bar in (gate.bars if gate else ()) if bar.verdict == "not enough samples" and bar.kind == "retention"
    ]
    if not undecided:
        raise RecipeError(
            "the gate does not need more samples of the tasks; give --limit to evaluate more nevertheless"
        )
    needed = [bar.samples_needed / bar.samples for bar in undecided if bar.samples_needed]
    if len(needed) < len(undecided):
        raise RecipeError(
            "no feasible number of samples can decide the gate, because the retention equals its bar; give --limit to "
            "evaluate more nevertheless"
        )
    return max(needed)


def can_continue(task: Any, before: TaskResult) -> bool:
    """Check that the results of further documents can be joined with these."""
    from lm_eval.api.metrics import mean

    # Few-shot examples are drawn document by document, and sampled text depends on all earlier samples.
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


def join_results(task: Any, before: TaskResult, *, more: TaskResult) -> TaskResult:
    """Return the result over the documents of both parts; metrics that are not means are left out of ``values``."""
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
