"""Validation of the task names in ``evaluation.metrics`` and ``evaluation.gate.per_task``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmprune.common.errors import RecipeError, did_you_mean
from llmprune.evaluation.lm_eval.loaded_task import LoadedTask
from llmprune.recipe.evaluation import Evaluation

_LISTED = 5  # names; a group may have dozens


def require_names(evaluation: Evaluation, loaded: Mapping[str, LoadedTask]) -> None:
    """Raise RecipeError if a metric or the gate names a task that is not evaluated or cannot be judged."""
    known = [*loaded, *{task.group for task in loaded.values() if task.group}]
    wrong_metrics = _wrong_metrics(evaluation, loaded, known=known)
    problems = [*wrong_metrics]
    for name in evaluation.gate.per_task if evaluation.gate else ():
        if name not in known:
            problems.append(f"evaluation.gate.per_task: {name!r} {_not_judged(name, evaluation, known=known)}")
        elif name not in loaded and not wrong_metrics:
            problems += _mixed(name, evaluation, members=[task for task in loaded.values() if task.group == name])
    if problems:
        raise RecipeError(problems)


def _wrong_metrics(evaluation: Evaluation, loaded: Mapping[str, LoadedTask], *, known: Sequence[str]) -> list[str]:
    problems = []
    for name, wanted in evaluation.metrics.items():
        if name not in loaded:
            problems.append(f"evaluation.metrics: {name!r} is not an evaluated task{did_you_mean(name, known)}")
            continue
        metrics = list(loaded[name].task.aggregation())
        if wanted.partition(",")[0] not in metrics:
            near = did_you_mean(wanted, metrics) or f"; it has {', '.join(metrics)}"
            problems.append(f"evaluation.metrics: the task {name!r} has no metric {wanted!r}{near}")
    return problems


def _not_judged(name: str, evaluation: Evaluation, *, known: Sequence[str]) -> str:
    """Return why the gate cannot judge a task or group."""
    if name in evaluation.task_names:  # a tag, or a group whose tasks another group includes already
        return f"has no score of its own; name single tasks, such as {_some(known)}"
    return f"is not evaluated{did_you_mean(name, known)}; name one of evaluation.tasks"


def _mixed(group: str, evaluation: Evaluation, *, members: Sequence[LoadedTask]) -> list[str]:
    """Return a problem if the tasks of a group have different metrics or directions."""
    chosen = {}
    for task in members:
        directions = task.task.higher_is_better()
        metric = evaluation.metrics.get(task.name, "").partition(",")[0] or next(iter(directions), "")
        chosen[task.name] = metric, directions.get(metric) is not False
    if len(set(chosen.values())) < 2:
        return []
    metrics = _some([f"{name} by {metric}" for name, (metric, _) in chosen.items()])
    return [
        f"evaluation.gate.per_task: the tasks of {group!r} have different metrics ({metrics}), so they have no common "
        "score; give all of them one metric in evaluation.metrics, or name single tasks"
    ]


def _some(names: Sequence[str]) -> str:
    """Return the first few names."""
    return ", ".join([*names[:_LISTED], *(["…"] if len(names) > _LISTED else [])])
