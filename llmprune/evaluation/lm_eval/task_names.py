"""Whether the names in ``evaluation.metrics`` and ``evaluation.gate.per_task`` are those of what is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmprune.common.errors import RecipeError, did_you_mean
from llmprune.recipe.evaluation import Evaluation

if TYPE_CHECKING:
    from llmprune.evaluation.lm_eval.tasks import Loaded

_LISTED = 5  # names; a group may have dozens


def require_names(evaluation: Evaluation, loaded: Mapping[str, Loaded]) -> None:
    """Raise RecipeError unless the metrics and the gate name what is there, and what can be judged."""
    known = [*loaded, *{one.group for one in loaded.values() if one.group}]
    wrong_metrics = _wrong_metrics(evaluation, loaded, known=known)
    problems = [*wrong_metrics]
    for name in evaluation.gate.per_task if evaluation.gate else ():
        if name not in known:
            problems.append(f"evaluation.gate.per_task: {name!r} {_not_judged(name, evaluation, known=known)}")
        elif name not in loaded and not wrong_metrics:
            problems += _mixed(name, evaluation, members=[one for one in loaded.values() if one.group == name])
    if problems:
        raise RecipeError(problems)


def _wrong_metrics(evaluation: Evaluation, loaded: Mapping[str, Loaded], *, known: Sequence[str]) -> list[str]:
    problems = []
    for name, wanted in evaluation.metrics.items():
        if name not in loaded:
            problems.append(f"evaluation.metrics: {name!r} is no task that is evaluated{did_you_mean(name, known)}")
            continue
        metrics = list(loaded[name].task.aggregation())
        if wanted.partition(",")[0] not in metrics:
            near = did_you_mean(wanted, metrics) or f"; it has {', '.join(metrics)}"
            problems.append(f"evaluation.metrics: the task {name!r} has no metric {wanted!r}{near}")
    return problems


def _not_judged(name: str, evaluation: Evaluation, *, known: Sequence[str]) -> str:
    """Say why the gate cannot judge a name."""
    if name in evaluation.tasks:  # a tag, or a group whose tasks another group brought already
        return f"has no figure of its own; name single tasks, which are {_some(known)}"
    return f"is not evaluated{did_you_mean(name, known)}; name one of evaluation.tasks"


def _mixed(group: str, evaluation: Evaluation, *, members: Sequence[Loaded]) -> list[str]:
    """Return a problem where the tasks of a group are not all judged by one metric with one direction."""
    chosen = {}
    for one in members:
        directions = one.task.higher_is_better()
        metric = evaluation.metrics.get(one.name, "").partition(",")[0] or next(iter(directions), "")
        chosen[one.name] = metric, directions.get(metric) is not False
    if len(set(chosen.values())) < 2:
        return []
    said = _some([f"{name} by {metric}" for name, (metric, _) in chosen.items()])
    return [
        f"evaluation.gate.per_task: the tasks of {group!r} have different metrics ({said}), so they have no figure "
        "together; give all of them one metric in evaluation.metrics, or name single tasks"
    ]


def _some(names: Sequence[str]) -> str:
    """List the first few names."""
    return ", ".join([*names[:_LISTED], *(["…"] if len(names) > _LISTED else [])])
