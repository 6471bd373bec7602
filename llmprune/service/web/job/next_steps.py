"""What a job's page offers next: code that loads the model, follow-ups, and those that were made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.common.errors import RecipeError
from llmprune.service.api.dependencies import Service
from llmprune.service.jobs.follow_ups.follow_ups import offers_of
from llmprune.service.jobs.follow_ups.recipes import Sizes, recipe_of, sizes_of
from llmprune.service.jobs.follow_ups.reevaluation import evaluated
from llmprune.service.jobs.job import FINISHED, Job, JobQuery, JobSummary
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.recipe_policy.allowed_paths import task_folders
from llmprune.service.supervisor.launchers import offered_launchers
from llmprune.service.users.tokens import Caller
from llmprune.service.web.job.local_tasks import local_tasks

MOST_MADE = 50
# Tasks that the form names; any other can be typed.
TASKS = {
    "arc_easy": "school science, easy",
    "arc_challenge": "school science, hard",
    "hellaswag": "everyday situations",
    "piqa": "physical common sense",
    "winogrande": "who is meant",
    "lambada_openai": "last word of a passage",
    "gsm8k": "school mathematics, slow",
}
TITLES = {
    "evaluate": "Evaluate more tasks",
    "bench": "Time it",
    "size": "Make another size",
    "recover": "Train it on more tokens",
    "sparsify": "Make it sparse",
    "repeat": "Repeat it",
}
_MOST_BYTES = 1_000_000  # of a config


@dataclass(frozen=True)
class Loading:
    """Lines that load the model. ``places``: repositories that it was pushed to, and the downloaded folder."""

    auto_class: str
    remote_code: bool
    tokenizer: bool
    places: tuple[str, ...]


@dataclass(frozen=True)
class NextSteps:
    """Values of the panel. ``reasons``: by kind, why the job cannot have a follow-up; None: it can."""

    reasons: dict[str, str | None]
    sizes: Sizes | None
    tasks: dict[str, str]
    local_tasks: dict[str, str]  # folder of each, by name
    evaluated: tuple[str, ...]
    loading: Loading | None
    made: list[JobSummary]
    parent: JobSummary | None  # of a follow-up; None where the caller may not read it, or it was deleted
    task_folders: tuple[str, ...]
    launchers: tuple[str, ...]  # empty: there are no GPUs here, and no other machine
    gpus: int

    @property
    def possible(self) -> bool:
        """True where at least one follow-up that works on the model is possible."""
        return any(reason is None for kind, reason in self.reasons.items() if kind != "repeat")

    @property
    def titles(self) -> dict[str, str]:
        """Names of the follow-ups on the page, by kind."""
        return TITLES

    @property
    def refused(self) -> dict[str, str]:
        """Reasons of the follow-ups that are not possible, by kind."""
        return {kind: reason for kind, reason in self.reasons.items() if reason is not None}


def next_steps_of(service: Service, job: Job, *, caller: Caller) -> NextSteps:
    """Return what the page of a job offers next to the caller."""
    may_ask = job.ended and caller.may("submit")
    reasons = {one.kind: one.reason for one in offers_of(job, service.settings)} if may_ask else {}
    had = _tasks_of(service, job)
    made = service.jobs.page(JobQuery(service.viewer(caller), made_from=job.id, limit=MOST_MADE)).jobs
    parent = service.find(job.made_from, caller) if job.made_from else None
    launchers = offered_launchers(service.settings)
    has_choice = service.settings.gpus or not all(one.on_this_machine for one in launchers.values())
    return NextSteps(
        reasons={kind: reason and service.paths.hide(reason) for kind, reason in reasons.items()},
        sizes=_sizes_of(job) if reasons.get("size", "") is None else None,
        tasks={name: words for name, words in TASKS.items() if name not in had},
        local_tasks={name: folder for name, folder in local_tasks(service.settings).items() if name not in had},
        evaluated=had,
        loading=_loading_of(service, job, caller=caller),
        made=[service.shown(one) for one in made],
        parent=parent and service.shown(parent),
        task_folders=tuple(task_folders(service.settings)),
        launchers=tuple(launchers) if has_choice else (),
        gpus=len(service.settings.gpus),
    )


def _tasks_of(service: Service, job: Job) -> tuple[str, ...]:
    try:
        return evaluated(job, service.settings).task_names if job.state in FINISHED and job.figures else ()
    except Conflict:
        return ()


def _sizes_of(job: Job) -> Sizes | None:
    try:
        return sizes_of(recipe_of(job))
    except RecipeError:
        return None


def _loading_of(service: Service, job: Job, *, caller: Caller) -> Loading | None:
    """Return how the model of a job is loaded; None where it has none."""
    folder = service.settings.run_folder(job.id) / "model"
    try:
        config: Any = json.loads(_read(folder / "config.json"))
    except (OSError, ValueError):
        return None
    if job.cleaned or job.state not in FINISHED or not isinstance(config, dict):
        return None
    architectures = config.get("architectures")
    reads_images = isinstance(architectures, list) and str(architectures[:1]).endswith("ForConditionalGeneration']")
    pushes = service.jobs.page(JobQuery(service.viewer(caller), source=job.id, limit=MOST_MADE)).jobs
    pushed = dict.fromkeys(one.published.repo_id for one in pushes if one.published is not None)
    return Loading(
        auto_class="AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM",
        remote_code="auto_map" in config,
        tokenizer=(folder / "tokenizer_config.json").is_file(),
        places=(*pushed, f"runs/{job.id}/model"),
    )


def _read(path: Path) -> str:
    """Read a text file. Raises OSError, and ValueError for one that is too long."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path.name} has more than {_MOST_BYTES} bytes")
    return content.decode("utf-8")
