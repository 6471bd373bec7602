"""Notes on an evaluation that cannot show what a run changes."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.anatomy.types import Anatomy
from llmprune.recipe.recipe import Recipe

_OF_TASKS = ("metrics", "include_path", "limit", "num_fewshot", "backend")


def about_judgement(recipe: Recipe, anatomy: Anatomy, *, keep: Sequence[int]) -> list[str]:
    """Return notes where layers are removed and no task lets the models write, and on settings without use."""
    noted = [*_about_before_recovery(recipe), *_about_tasks(recipe)]
    if len(keep) == anatomy.num_layers:
        return noted
    if recipe.evaluation.task_names:
        from llmprune.evaluation.lm_eval.generating_tasks import may_generate

        if may_generate(recipe.evaluation):
            return noted
    return [
        *noted,
        "layers are removed and no task generates answers: without layers generated reasoning breaks long before "
        "multiple choice shows it (published for 32 of 36 layers: MMLU stays at 0.740, GSM8K falls to 0.287); add "
        "gsm8k or another generating task to evaluation.tasks, or set evaluation.suite to general",
    ]


def _about_before_recovery(recipe: Recipe) -> list[str]:
    """Return a note where the model before the training cannot be evaluated, or nothing of it."""
    evaluation = recipe.evaluation
    if not evaluation.before_recovery:
        return []
    if recipe.recover is None:
        return ["evaluation.before_recovery: not used, because nothing is trained; add a section recover, or remove it"]
    if not evaluation.task_names and evaluation.perplexity is None:
        return ["evaluation.before_recovery: measures nothing; name tasks, or text for evaluation.perplexity"]
    return []


def _about_tasks(recipe: Recipe) -> list[str]:
    """Return a note on settings of tasks where there is none."""
    evaluation = recipe.evaluation
    given = [name for name in _OF_TASKS if name in evaluation.model_fields_set and getattr(evaluation, name)]
    if evaluation.task_names or not given:
        return []
    listed = ", ".join(f"evaluation.{name}" for name in given)
    return [f"{listed}: not used, because no task is evaluated; name some in evaluation.tasks, or remove it"]
