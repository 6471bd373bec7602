"""Recipes of follow-ups: the overrides that are added to those of the parent.

A recovery and a pattern of zeros start from the parent's model, which keeps its cut, its repair and its training; they
leave out all that cuts, and compare with the parent's base. Another size keeps the criteria and the text, on which the
scores depend, and changes the numbers alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from llmprune.common.errors import RecipeError
from llmprune.evaluation.more_samples import with_tasks
from llmprune.recipe.evaluation import limit_override
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.yaml_reader import dump
from llmprune.service.jobs.follow_ups.reevaluation import evaluated, report_of, samples_of
from llmprune.service.jobs.follow_ups.work import Evaluate, Recover, Size, Sparsify, Work
from llmprune.service.jobs.job import BY_TASK, Job
from llmprune.service.recipe_policy.rules import may_be_path
from llmprune.service.settings import Settings

_CUTS = ("budget", "depth", "width", "experts", "hidden", "vocabulary", "sparsity")


def overrides_of(parent: Job, work: Work, *, settings: Settings) -> list[str]:
    """Return the overrides of a follow-up's recipe, those of the parent first. Raises RecipeError and Conflict."""
    asked = parent.model_copy(update={"overrides": _without_jobs(parent.overrides, settings)})
    return [*asked.overrides, *_added(asked, work, settings=settings)]


def _without_jobs(overrides: Sequence[str], settings: Settings) -> tuple[str, ...]:
    """Return overrides without the folders that the policy has put in place of ``job://ID``, and refuses itself."""
    jobs = json.dumps(str(settings.data_dir.absolute() / "jobs"))[:-1]
    return tuple(one for one in overrides if not one.partition("=")[2].startswith(f"{jobs}/"))


def _added(parent: Job, work: Work, *, settings: Settings) -> list[str]:
    if isinstance(work, Evaluate):
        return _of_evaluation(parent, work, settings=settings)
    if isinstance(work, Size):
        return _of_size(recipe_of(parent), work)
    if isinstance(work, Recover):
        return _of_recovery(recipe_of(parent), work, base=_base(parent, settings))
    if isinstance(work, Sparsify):
        return _of_sparsity(recipe_of(parent), work, base=_base(parent, settings))
    return []


def recipe_of(job: Job) -> Recipe:
    """Return a job's recipe with its overrides. Raises RecipeError where this version cannot read it."""
    return _parsed(job.recipe, tuple(job.overrides))


@lru_cache(maxsize=32)  # a page asks several times
def _parsed(text: str, overrides: tuple[str, ...]) -> Recipe:
    return Recipe.parse(text, overrides)


def editable_recipe(job: Job) -> str:
    """Return a job's recipe for the editor, with its overrides applied; comments are lost where there are any.

    The absolute paths that the policy put in place of allowed ones are left out: the recipe has those.
    """
    own = [override for override in job.overrides if not _is_allowed_path(override)]
    if not own:
        return job.recipe
    try:
        return dump(Recipe.read(job.recipe, own).data)
    except RecipeError:  # of another version
        return job.recipe


def _is_allowed_path(override: str) -> bool:
    key, _, value = override.partition("=")
    return may_be_path(key) and value.startswith('"/')


@dataclass(frozen=True)
class Sizes:
    """Sizes in a job's recipe that another size changes; None: the recipe has no such number."""

    keep: float | None = None  # fraction of the parameters
    layers: int | None = None  # removed
    mlp: float | None = None  # fraction of the neurons kept
    by_budget: bool = False


def sizes_of(recipe: Recipe) -> Sizes:
    """Return the sizes of a recipe. Raises RecipeError where another size would reuse no scores."""
    if recipe.recover is not None and recipe.recover.rounds > 1:
        raise _no_size("each round of its training scores the model of the round before")
    if recipe.budget is not None:
        if set(recipe.budget.limits) != {"parameters"}:
            raise _no_size(f"its budget limits {', '.join(recipe.budget.limits)}, not the number of parameters")
        (limit,) = recipe.budget.limits["parameters"]
        return Sizes(keep=limit if isinstance(limit, float) else None, by_budget=True)
    depth, width = recipe.depth, recipe.width
    scores_layers = depth is not None and depth.layers is None
    if not scores_layers and (width is None or not width.cuts_mlp):
        raise _no_size("its recipe scores neither layers nor neurons")
    layers = depth.remove if depth is not None and scores_layers else None
    return Sizes(layers=layers, mlp=width.mlp if width is not None else None)


def _no_size(reason: str) -> RecipeError:
    return RecipeError(f"another size cannot reuse its scores: {reason}; change the recipe in a new job", "follow-up")


def _of_size(recipe: Recipe, work: Size) -> list[str]:
    by_budget = sizes_of(recipe).by_budget
    if by_budget != (work.keep is not None) or (by_budget and (work.layers or work.mlp)):
        wanted = "keep, a fraction of the parameters" if by_budget else "layers, mlp or both"
        raise RecipeError(f"the size of this job is given by {wanted}; give that alone", "follow-up")
    if work.keep is not None:
        return [f"budget.parameters={work.keep}"]
    depth, width, added = recipe.depth, recipe.width, []
    if work.layers is not None:
        if depth is None or depth.layers is not None:
            raise RecipeError("layers: the job has not scored layers; give mlp, or submit a new job", "follow-up")
        added += ["depth.keep=null", f"depth.remove={work.layers}"]
    if work.mlp is not None:
        if width is None or not width.cuts_mlp:
            raise RecipeError("mlp: the job has not scored neurons; give layers, or submit a new job", "follow-up")
        added += ["width.neurons=null", f"width.mlp={work.mlp}"]
    return added


def _of_evaluation(parent: Job, work: Evaluate, *, settings: Settings) -> list[str]:
    if not work.tasks:
        samples = samples_of(parent, work.limit, settings=settings)
        return [] if samples == BY_TASK else [limit_override(samples)]
    try:
        changed = with_tasks(evaluated(parent, settings), work.tasks, limit=work.limit)
    except RecipeError as error:
        raise RecipeError([_of_form(problem) for problem in error.problems], "follow-up") from error
    added = [f"evaluation.tasks={json.dumps(changed['tasks'])}"]
    added += [limit_override(changed["limit"])] if "limit" in changed else []
    return [*added, *_task_folder(work)]


def _task_folder(work: Evaluate) -> list[str]:
    return [] if work.include_path is None else [f"evaluation.include_path={json.dumps(work.include_path)}"]


def _of_form(problem: str) -> str:
    return problem.replace("--tasks", "tasks").replace("--limit", "limit")


def _of_recovery(recipe: Recipe, work: Recover, *, base: tuple[str, str] | None) -> list[str]:
    if base is None:
        raise RecipeError(
            "a training needs the base as its teacher, which cannot be a GGUF file in a repository or an adapter; "
            "submit a recipe that prunes and recovers in one job",
            "follow-up",
        )
    own = recipe.recover is not None and "seed" in recipe.recover.data.model_fields_set
    seed = recipe.recover.data.seed if own and recipe.recover is not None else recipe.calibration.seed
    name, revision = map(json.dumps, base)
    return [
        _model(recipe),
        *_without(_CUTS),
        "refit=false",
        "calibration.self_generated=0",
        "evaluation.against=null",
        'evaluation.against_revision="main"',
        f"recover.tokens={json.dumps(work.tokens)}",
        f"recover.hours={json.dumps(work.hours)}",
        "recover.rounds=1",
        f"recover.against={name}",
        f"recover.against_revision={revision}",
        f"recover.data.seed={(seed + 1) % 2**32}",  # other text than the training before
    ]


def _of_sparsity(recipe: Recipe, work: Sparsify, *, base: tuple[str, str] | None) -> list[str]:
    against = ["evaluation.against=null"]  # with itself before
    if base is not None:
        name, revision = map(json.dumps, base)
        against = [f"evaluation.against={name}", f"evaluation.against_revision={revision}"]
    zeros = f"sparsity={{pattern: {json.dumps(work.pattern)}}}"
    others = ["recover=null", "evaluation.before_recovery=false", zeros]
    return [_model(recipe), *_without(_CUTS), *others, *against]


def _model(recipe: Recipe) -> str:
    """Return the override of the model section without what belongs to the files of the base alone."""
    of_files = {"revision", "gguf", "base", "base_revision", "pickles"}
    return f"model={json.dumps(recipe.model.model_dump(mode='json', exclude=of_files, exclude_unset=True))}"


def _without(sections: tuple[str, ...]) -> list[str]:
    return [f"{section}=null" for section in sections]


def _base(parent: Job, settings: Settings) -> tuple[str, str] | None:
    """Return name and commit of the model that the parent was compared with; None where a recipe cannot name it."""
    recipe = recipe_of(parent)
    if isinstance(parent.work, Sparsify) and recipe.evaluation.against is None:
        return None
    for section in (recipe.recover, recipe.evaluation):
        if section is not None and section.against is not None:
            return section.against, section.against_revision
    if recipe.model.gguf is not None or recipe.model.base is not None:
        return None
    origin = report_of(parent, settings).get("provenance")
    commit = origin.get("commit") if isinstance(origin, dict) else None
    return recipe.model.id, commit if isinstance(commit, str) else recipe.model.revision
