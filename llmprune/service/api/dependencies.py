"""Dependencies of the routes: the service, the caller, and lookups that several routes share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi import Path as InPath

from llmprune.common.errors import LLMPruneError
from llmprune.recipe.recipe import Recipe
from llmprune.service.api.access.server_paths import ServerPaths
from llmprune.service.api.error_responses import Refused
from llmprune.service.api.files.stored_files import StoredFiles
from llmprune.service.api.jobs.recipe_queue import RecipeQueue
from llmprune.service.api.jobs.stored_models import Outline, outline_for
from llmprune.service.database.database import Database
from llmprune.service.jobs.job import JOB_ID, J, Job
from llmprune.service.jobs.library.job_models import JobModels
from llmprune.service.jobs.store import JobStore
from llmprune.service.monitoring.board import QueueBoard
from llmprune.service.notifications.outbox import Outbox
from llmprune.service.planner.planner import Planner
from llmprune.service.planner.queue import PlannerBusy
from llmprune.service.recipe_policy.allowed_paths import JOB_SCHEME
from llmprune.service.recipe_policy.policy import ExaminedRecipe
from llmprune.service.settings import Settings
from llmprune.service.users.sessions import Sessions
from llmprune.service.users.tokens import Caller, Tokens
from llmprune.service.users.users import Users


@dataclass(frozen=True)
class Service:
    """The parts of a running service."""

    settings: Settings
    database: Database
    jobs: JobStore
    tokens: Tokens
    planner: Planner
    recipe_queue: RecipeQueue
    hash_queue: RecipeQueue
    wake: Callable[[], None]  # wakes the supervisor
    paths: ServerPaths  # renames paths of the server in what clients see
    outbox: Outbox
    queue_board: QueueBoard
    stored_files: StoredFiles  # files of jobs on other machines
    clock: Callable[[], float] = time.monotonic  # of the supervisor's heartbeats

    @property
    def users(self) -> Users:
        """The users of the service."""
        return Users(self.database)

    @property
    def sessions(self) -> Sessions:
        """The browser sessions of all users."""
        return Sessions(self.database)

    def find(self, job: str, caller: Caller) -> Job | None:
        """Return the job of this id; None where there is none that the caller may read."""
        found = self.jobs.get(job)
        if found is None or not caller.may_read(found.owner, found.shared or self.settings.share_jobs):
            return None
        return found

    def job(self, job: str, caller: Caller) -> Job:
        """Return the job of this id. Raises Refused (404) where there is none that the caller may read."""
        found = self.find(job, caller)
        if found is None:
            raise Refused(404, f"there is no job {job!r}")
        return found

    def shown(self, job: J) -> J:
        """Return a job as clients see it, with the server's paths in its overrides and its error renamed."""
        hidden = {"error": self.paths.hide_in(job.error)}
        if isinstance(job, Job):
            hidden["overrides"] = tuple(self.paths.hide_in(job.overrides))
        return job.model_copy(update=hidden)

    def plan(self, examined: ExaminedRecipe, caller: Caller) -> dict[str, Any]:
        """Plan the part of a recipe that can be planned: ``{"plan": …}`` or ``{"problems": […]}``.

        Raises PlannerBusy and TooManyPlans.
        """
        if examined.recipe is None:
            return {"problems": []}
        try:
            outline = self._outline(examined.recipe, caller)
        except PlannerBusy:
            raise
        except LLMPruneError as error:
            problems = [f"model.id: the model is only in the artefact store, and a plan needs its config: {error}"]
            return {"problems": self.paths.hide_in(problems)}
        overrides = outline.in_overrides(examined.overrides) if outline else examined.overrides
        found = self.planner.plan(examined.text, overrides, caller=caller.name, wrong=examined.wrong)
        answer: dict[str, Any] = self.paths.hide_in(outline.out_of(found) if outline else found)
        return answer

    def times(self, variants: Sequence[ExaminedRecipe], caller: Caller) -> list[dict[str, Any] | None]:
        """Return how long each of some recipes runs, as the planner does. Raises PlannerBusy and TooManyPlans."""
        recipes = []
        for one in variants:
            try:
                outline = self._outline(one.recipe, caller) if one.recipe is not None else None
            except PlannerBusy:
                raise
            except LLMPruneError:  # the plan says what is wrong
                return [None] * len(variants)
            recipes.append((one.text, outline.in_overrides(one.overrides) if outline else one.overrides))
        return self.planner.times(recipes, caller=caller.name)

    def _outline(self, recipe: Recipe, caller: Caller) -> Outline | None:
        """Return what a plan reads of a model that only the store has; a caller may fetch one at a time."""
        models = self.models(caller)
        if not recipe.model.id.startswith(JOB_SCHEME) or self.stored_files.store is None:
            return None
        with self.planner.queue.place(f"files for {caller.name}"):
            return outline_for(recipe.model.id, models, store=self.stored_files.store)

    def models(self, caller: Caller) -> JobModels:
        """Return the models of finished jobs that a recipe of the caller may start from."""
        return JobModels(self.jobs, self.settings, caller)

    def viewer(self, caller: Caller) -> str | None:
        """Return the viewer of a JobQuery for the caller; None: every job."""
        return None if caller.role == "admin" or self.settings.share_jobs else caller.name

    def own_job(self, job: str, caller: Caller) -> Job:
        """Return a job that the caller may change. Raises Refused (404, 403)."""
        found = self.job(job, caller)
        if not caller.may_change(found.owner):
            raise Refused(403, f"job {job} belongs to {found.owner}; only its owner and admins may change it")
        return found

    def artifact(self, job: str, name: str, *, caller: Caller) -> Path:
        """Return the path of a file in a job's run folder. Raises Refused (404) for hidden files and files outside."""
        folder = self.settings.run_folder(self.job(job, caller).id).resolve()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or "\0" in name or "\\" in name or name.startswith("/"):
            raise Refused(404, f"job {job} has no artefact {name!r}")
        place = (folder / name).resolve()
        if not place.is_relative_to(folder) or not place.is_file():
            raise Refused(404, f"job {job} has no artefact {name!r}")
        return place


def service_of(request: Request) -> Service:
    """Return the service that answers a request."""
    found: Service = request.app.state.service
    return found


def caller_of(request: Request) -> Caller:
    """Return the caller that AuthMiddleware has identified."""
    found: Caller = request.state.caller
    return found


def audit_details(request: Request, **values: Any) -> None:
    """Add values that a request sets to its line of the audit log; None is left out. Never a secret."""
    request.state.audit = {name: value for name, value in values.items() if value is not None}


TheService = Annotated[Service, Depends(service_of)]
TheCaller = Annotated[Caller, Depends(caller_of)]
JobId = Annotated[str, InPath(pattern=f"^{JOB_ID}$", description="The job's id.")]
