"""Command lines of follow-ups, which read the run folder of another job."""

from __future__ import annotations

import json
from pathlib import Path

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.service.jobs.follow_ups.work import Bench, Evaluate, Size, Work
from llmprune.service.jobs.job import Job

BENCH = "bench.json"  # in the run folder of a bench


def follow_up_arguments(job: Job, work: Work, *, folder: Path, parent: Path) -> tuple[str, ...]:
    """Return the arguments of llmprune. Options and values are joined with =, so that no value is read as an option.

    ``folder``: of the job; ``parent``: the run folder that it reads.
    """
    run = folder / "run"
    if isinstance(work, Bench):
        against = base_option(job, folder, name="against")
        return ("bench", str(parent), *against, *_bench_options(work), f"--output={run / BENCH}")
    if isinstance(work, Evaluate):
        tasks = [f"--tasks={','.join(work.tasks)}"] if work.tasks else []
        limit = [f"--limit={work.limit}"] if work.limit is not None else []
        folder_of_tasks = _include_path(job) if work.include_path is not None else []
        base = base_option(job, folder, name="base")
        return ("reevaluate", str(parent), *tasks, *limit, *folder_of_tasks, *base, f"--output={run}")
    own = [] if isinstance(work, Size) else [f"model.id={json.dumps(str(parent / 'model'))}"]
    sets = [part for override in (*job.overrides, *own) for part in ("--set", override)]
    scores = [f"--scores-of={parent}"] if isinstance(work, Size) else []
    return ("run", str(folder / "recipe.yaml"), "--output", str(run), *scores, *sets)


def base_option(job: Job, folder: Path, *, name: str) -> list[str]:
    """Return the option with the model that a run is compared with, where that is the model of another job.

    The report names the folder that this model had on the machine of the run. ``folder``: of the job.
    """
    if job.base is None:
        return []
    place = str(folder.with_name(job.base) / "run" / "model")
    try:
        compared = Recipe.parse(job.recipe, job.overrides).reference.id
    except RecipeError:  # of another version; the run says so
        return []
    return [f"--{name}={place}"] if compared == place else []


def _bench_options(work: Bench) -> list[str]:
    return [
        f"--batch-sizes={','.join(map(str, work.batch_sizes))}",
        f"--contexts={','.join(map(str, work.contexts))}",
        f"--new-tokens={work.new_tokens}",
        f"--repeats={work.repeats}",
        f"--dtype={work.dtype}",
        *(["--static-cache"] if work.static_cache else []),
    ]


def _include_path(job: Job) -> list[str]:
    """Return the option of the task folder, whose path the policy has put into the overrides."""
    given = [
        override.partition("=")[2] for override in job.overrides if override.startswith("evaluation.include_path=")
    ]
    return [f"--include-path={json.loads(given[-1])}"]
