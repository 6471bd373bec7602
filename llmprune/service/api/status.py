"""The service itself: is it well, what does it have, what has it done."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from llmprune import __version__
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.metrics import Metrics
from llmprune.service.jobs.job import ACTIVE, State
from llmprune.service.jobs.tokens import Caller
from llmprune.service.supervisor.devices import takes_part

router = APIRouter(prefix="/v1", tags=["service"])
open_router = APIRouter(prefix="/v1", tags=["service"])  # no token is needed

ALIVE_WITHIN = 15.0  # seconds since the supervisor's last sign of life


class Health(BaseModel):
    """The service answers."""

    status: str
    version: str


class Device(BaseModel):
    """A GPU of this machine."""

    name: str
    busy: bool = Field(description="Whether a job holds it.")
    job: str | None = Field(description="Id of the job that holds it; null if the caller may not read it.")


class Queue(BaseModel):
    """What waits and what there is."""

    counts: dict[State, int] = Field(description="Jobs that the caller may read.")
    slots: int = Field(description="CPU jobs that may run at a time.")
    slots_used: int
    devices: list[Device]
    launchers: list[str]
    supervisor_alive: bool
    disk_quota_reached: bool = Field(description="Then waiting jobs do not start.")


@open_router.get("/health")
def health() -> Health:
    """The service answers; no token is needed."""
    return Health(status="ok", version=__version__)


@open_router.get("/ready", responses={503: documented(503)[503]})
def ready(service: TheService) -> Health:
    """The service takes and runs jobs; no token is needed."""
    if not heartbeat(service)[0]:
        raise Refused(503, "the supervisor does not answer; it is started again by itself")
    return Health(status="ready", version=__version__)


@router.get("/queue", responses=documented())
def queue(service: TheService, caller: TheCaller) -> Queue:
    """Jobs by state, and who holds which device."""
    return queue_of(service, caller)


def queue_of(service: Service, caller: Caller) -> Queue:
    """The state of queue and devices, as the caller may see it."""
    running = service.jobs.in_states(*ACTIVE)
    holders = {device: job.id for job in running for device in job.devices}
    readable = {job for job in holders.values() if service.find(job, caller)}
    alive, full = heartbeat(service)
    return Queue(
        counts=service.jobs.counts(viewer=service.viewer(caller)),
        slots=service.settings.slots,
        slots_used=sum(not job.gpus and takes_part(job, service.settings.elsewhere) for job in running),
        devices=[
            Device(name=gpu, busy=gpu in holders, job=holders[gpu] if holders.get(gpu) in readable else None)
            for gpu in service.settings.gpus
        ],
        launchers=list(service.settings.launchers),
        supervisor_alive=alive,
        disk_quota_reached=full,
    )


def heartbeat(service: Service) -> tuple[bool, bool]:
    """Whether the supervisor is alive, by the clock that nobody sets, and whether the disk quota is used up."""
    rows = service.database.read("SELECT monotonic, full FROM heartbeat")
    if not rows:
        return False, False
    return 0 <= time.monotonic() - rows[0]["monotonic"] < ALIVE_WITHIN, bool(rows[0]["full"])


@router.get("/metrics", response_class=PlainTextResponse, responses=documented())
def metrics(request: Request, caller: TheCaller) -> Response:
    """Figures for Prometheus, of the whole service: sums that name no job and no user."""
    del caller
    known: Metrics = request.app.state.metrics
    text, kind = known.render()
    return Response(text, media_type=kind)
