"""A submission: the recipe is let in, the wishes beside it are held against what the service has."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.errors import RecipeError
from llmprune.recipe import Recipe
from llmprune.service.guard import admit
from llmprune.service.job import Job, JobRequest
from llmprune.service.secrets import keep_token
from llmprune.service.settings import Settings
from llmprune.service.table import Jobs
from llmprune.service.tokens import Caller


@dataclass(frozen=True)
class Submission:
    """What somebody wants to be run; what is None is for the service to choose."""

    recipe: str
    overrides: Sequence[str] = ()
    name: str | None = None
    launcher: str = "local"
    gpus: int | None = None
    priority: int = 0
    time_limit: float | None = None
    key: str | None = None
    hub_token: str | None = None

    def digest(self) -> str:
        """What an idempotency key stands for; the hub token is no part of it."""
        wishes = (
            self.recipe,
            list(self.overrides),
            self.name,
            self.launcher,
            self.gpus,
            self.priority,
            self.time_limit,
        )
        return hashlib.sha256(json.dumps(wishes).encode()).hexdigest()


def submit(submission: Submission, caller: Caller, settings: Settings, jobs: Jobs) -> tuple[Job, bool]:
    """Queue a job; whether it is new. Raises RecipeError, Conflict and QueueFull."""
    recipe, overrides = admit(submission.recipe, submission.overrides, settings)
    request = _request(submission, recipe, caller, settings)
    job = secrets.token_hex(6)
    folder = settings.folder(job)
    new = False
    try:
        if submission.hub_token:  # there before the job is: the supervisor may start it at once
            keep_token(folder, submission.hub_token)
        place = (submission.key, submission.digest())
        queued, new = jobs.add(
            caller.name, recipe.model.id, submission.recipe, overrides, request, settings.max_queued, job, *place
        )
        return queued, new
    finally:
        if not new:
            shutil.rmtree(folder, ignore_errors=True)


def _request(submission: Submission, recipe: Recipe, caller: Caller, settings: Settings) -> JobRequest:
    problems = []
    gpus = submission.gpus if submission.gpus is not None else min(1, len(settings.gpus))
    if submission.launcher not in settings.launchers:
        problems.append(f"launcher: {submission.launcher!r} is not offered; choose {', '.join(settings.launchers)}")
    if submission.launcher == "local" and gpus > len(settings.gpus):
        problems.append(f"gpus: {gpus} asked and this machine has {len(settings.gpus)}; ask for fewer")
    elif submission.launcher == "torchrun" and gpus > len(settings.gpus):
        problems.append(f"gpus: {gpus} asked and each node has {len(settings.gpus)}; ask for fewer")
    if submission.priority > 0 and caller.role != "admin":
        problems.append("priority: only admins go before others; give 0 or less")
    limits = [limit for limit in (submission.time_limit, settings.time_limit) if limit is not None]
    if settings.time_limit is not None and (submission.time_limit or 0) > settings.time_limit:
        problems.append(f"time_limit: {submission.time_limit:g} s asked and {settings.time_limit:g} s are the most")
    if problems:
        raise RecipeError(problems, "submission")
    return JobRequest(
        name=submission.name or default_name(recipe),
        launcher=submission.launcher,
        gpus=gpus,
        priority=submission.priority,
        time_limit=min(limits, default=None),
    )


def default_name(recipe: Recipe) -> str:
    """``SmolLM2-135M-Instruct −2 layers, 75% MLP``: what a person would call it."""
    words = [re.sub(r"\.gguf$", "", recipe.model.id.rstrip("/").rsplit("/", 1)[-1])]
    if recipe.depth:
        count = recipe.depth.remove or len(recipe.depth.layers or ())
        words.append(f"−{count} layers" if count else f"{recipe.depth.keep} layers")
    if recipe.width:
        words.append(f"{recipe.width.mlp:.0%} MLP" if recipe.width.mlp else "narrower MLP")
    if recipe.experts:
        words.append(f"−{recipe.experts.remove} experts" if recipe.experts.remove else f"{recipe.experts.keep} experts")
    return (words[0] + " " + ", ".join(words[1:])).strip()[:120]
