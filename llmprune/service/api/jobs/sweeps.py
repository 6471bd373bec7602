"""Routes of sweeps: several jobs from one recipe, which differ in the values of some keys."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi import Path as InPath
from starlette.concurrency import run_in_threadpool

from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.jobs.jobs import HubToken, IdempotencyKey
from llmprune.service.api.jobs.recipes import RECIPE_BODY, Overrides, RecipeText
from llmprune.service.api.values import CancelledSweep
from llmprune.service.jobs.job import JOB_ID
from llmprune.service.jobs.submission import Submission
from llmprune.service.jobs.sweeps.axes import MAX_AXES, MAX_POINTS, Sweep, SweepSummary, axis_of
from llmprune.service.jobs.sweeps.sweeps import SweepSubmission, cancel_sweep, find_sweep, list_sweeps, submit_sweep
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1/sweeps", tags=["sweeps"])

SweepId = Annotated[str, InPath(pattern=f"^{JOB_ID}$", description="The sweep's id.")]
_VARY = (
    f"Key and its values, as budget.parameters=0.9,0.8; repeated for more keys, at most {MAX_AXES} and {MAX_POINTS} "
    "combinations."
)


@router.post("", status_code=201, openapi_extra=RECIPE_BODY, responses=documented(409, 413, 415, 422, 507))
async def make_sweep(
    text: RecipeText,
    overrides: Overrides,
    *,
    service: TheService,
    caller: TheCaller,
    response: Response,
    vary: Annotated[list[str], Query(min_length=1, max_length=MAX_AXES, description=_VARY)],
    name: Annotated[str | None, Query(min_length=1, max_length=80, description="Name for people.")] = None,
    launcher: Annotated[str, Query(max_length=20, description="Launcher of every job.")] = "local",
    gpus: Annotated[int | None, Query(ge=0, le=1024, description="Number of GPUs of every job.")] = None,
    priority: Annotated[int, Query(ge=-100, le=100, description="Priority of every job.")] = 0,
    time_limit: Annotated[
        float | None, Query(gt=0, le=1e9, allow_inf_nan=False, description="Maximum run time of every job in seconds.")
    ] = None,
    shared: Annotated[bool, Query(description="Every user with a token may read the sweep and its jobs.")] = False,
    key: IdempotencyKey = None,
    hub_token: HubToken = None,
) -> Sweep:
    """Queue a job for every combination of values, all of them or none."""
    base = Submission(
        recipe=text,
        overrides=overrides,
        name=name,
        launcher=launcher,
        gpus=gpus,
        priority=priority,
        time_limit=time_limit,
        key=key,
        hub_token=hub_token,
        shared=shared,
    )
    submission = SweepSubmission(base, tuple(axis_of(one) for one in vary))
    sweep, new = await service.recipe_queue.run(
        caller.name, submit_sweep, submission, caller, settings=service.settings, jobs=service.jobs
    )
    response.headers["Location"] = f"/v1/sweeps/{sweep.id}"
    if not new:
        response.headers["Idempotent-Replay"] = "true"
    await run_in_threadpool(service.wake)
    return shown(sweep, service)


@router.get("", responses=documented())
def list_all_sweeps(service: TheService, caller: TheCaller) -> list[SweepSummary]:
    """List the newest sweeps that the caller may read."""
    return list_sweeps(service.database, service.viewer(caller))


@router.get("/{sweep}", responses=documented(404, 422))
def show_sweep(sweep: SweepId, service: TheService, *, caller: TheCaller) -> Sweep:
    """Show a sweep with its jobs, which are there as they are now."""
    return shown(readable_sweep(sweep, service, caller=caller), service)


@router.post("/{sweep}/cancel", responses=documented(404, 409, 422, 507))
def cancel_all(sweep: SweepId, service: TheService, *, caller: TheCaller) -> CancelledSweep:
    """Cancel every job of a sweep that waits or runs."""
    number = cancel_sweep(own_sweep(sweep, service, caller=caller), service.settings, jobs=service.jobs)
    service.wake()
    return CancelledSweep(cancelled=number)


def readable_sweep(sweep: str, service: Service, *, caller: Caller) -> Sweep:
    """Return a sweep that the caller may read, with those of its jobs that it may read. Raises Refused (404)."""
    found = find_sweep(service.database, sweep)
    shares = service.settings.share_jobs
    if found is None or not caller.may_read(found.owner, found.shared or shares):
        raise Refused(404, f"there is no sweep {sweep!r}")
    jobs = [one for one in found.jobs if caller.may_read(one.job.owner, one.job.shared or shares)]
    return found.model_copy(update={"jobs": jobs})


def own_sweep(sweep: str, service: Service, *, caller: Caller) -> Sweep:
    """Return a sweep that the caller may change, with those of its jobs that it may. Raises Refused (404, 403)."""
    found = readable_sweep(sweep, service, caller=caller)
    if not caller.may_change(found.owner):
        raise Refused(403, f"sweep {sweep} belongs to {found.owner}; only its owner and admins may change it")
    jobs = [one for one in found.jobs if caller.may_change(one.job.owner)]
    return found.model_copy(update={"jobs": jobs})


def shown(sweep: Sweep, service: Service) -> Sweep:
    """Return a sweep as clients see it, with the server's paths in the errors of its jobs renamed."""
    jobs = [one.model_copy(update={"job": service.shown(one.job)}) for one in sweep.jobs]
    return sweep.model_copy(update={"jobs": jobs})
