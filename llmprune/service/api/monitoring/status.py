"""Routes of the service itself: health, readiness, queue and devices, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from starlette.requests import Request
from starlette.responses import Response

from llmprune import __version__
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.monitoring.metrics import Metrics
from llmprune.service.api.values import Device, Health, Queue
from llmprune.service.jobs.job import ACTIVE
from llmprune.service.supervisor.devices import uses_this_machine
from llmprune.service.supervisor.launchers import offered_launchers, remote_launchers
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1", tags=["service"])
public_router = APIRouter(prefix="/v1", tags=["service"])  # no token is needed

ALIVE_WITHIN = 15.0  # seconds since the supervisor's last heartbeat


@public_router.get("/health")
def health() -> Health:
    """Answer as long as the HTTP server runs; no token is needed."""
    return Health(status="ok", version=__version__)


@public_router.get("/ready", responses={503: documented(503)[503]})
def ready(service: TheService) -> Health:
    """Answer 200 where jobs are accepted and started, 503 where the supervisor is away; no token is needed."""
    if not heartbeat(service)[0]:
        raise Refused(503, "the supervisor does not answer; it is restarted automatically")
    return Health(status="ready", version=__version__)


@router.get("/queue", responses=documented())
def queue(service: TheService, caller: TheCaller) -> Queue:
    """Return the jobs by state, and which job holds which device."""
    return queue_of(service, caller)


def queue_of(service: Service, caller: Caller) -> Queue:
    """Return the state of queue and devices, as the caller may see it."""
    running = service.jobs.in_states(*ACTIVE)
    holders = {device: job.id for job in running for device in job.devices}
    readable = {job for job in holders.values() if service.find(job, caller)}
    alive, full = heartbeat(service)
    remote = remote_launchers(service.settings)
    return Queue(
        counts=service.jobs.counts(viewer=service.viewer(caller)),
        slots=service.settings.slots,
        slots_used=sum(not job.gpus and uses_this_machine(job, remote) for job in running),
        devices=[
            Device(name=gpu, busy=gpu in holders, job=holders[gpu] if holders.get(gpu) in readable else None)
            for gpu in service.settings.gpus
        ],
        launchers=list(offered_launchers(service.settings)),
        supervisor_alive=alive,
        disk_quota_reached=full,
    )


def paused(service: Service) -> str | None:
    """Return why no waiting job starts; None where they start as usual."""
    alive, full = heartbeat(service)
    if full:
        return "no job starts, because the disk quota is reached"
    return None if alive else "no job starts until the supervisor has been restarted"


def heartbeat(service: Service) -> tuple[bool, bool]:
    """Return whether the supervisor is alive, by the monotonic clock, and whether the disk quota is reached."""
    rows = service.database.read('SELECT monotonic, "full" FROM heartbeat')
    if not rows:
        return False, False
    return 0 <= service.clock() - rows[0]["monotonic"] < ALIVE_WITHIN, bool(rows[0]["full"])


@router.get("/metrics", response_class=PlainTextResponse, responses=documented())
def metrics(request: Request, caller: TheCaller) -> Response:
    """Return metrics of the whole service for Prometheus; they name no job and no user."""
    del caller
    known: Metrics = request.app.state.metrics
    text, kind = known.render()
    return Response(text, media_type=kind)
