"""The Python client of the service.

from llmprune import AsyncClient
async with AsyncClient("http://127.0.0.1:8321") as client:
    job = await client.submit("recipe.yaml")
    async for event in job.events(): ...
    await job.fetch("results")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx2 as httpx

from llmprune.service.api.values import Comparison, Health, JobPage, Queue, Validation
from llmprune.service.client.aio.account import AsyncAccountMethods
from llmprune.service.client.aio.connection import AsyncConnection
from llmprune.service.client.aio.io import Pause
from llmprune.service.client.aio.job import AsyncJobHandle
from llmprune.service.client.aio.models import AsyncModelMethods
from llmprune.service.client.aio.sweeps import AsyncSweepMethods
from llmprune.service.client.aio.uploads import AsyncUploadMethods
from llmprune.service.client.aio.users import AsyncUserMethods
from llmprune.service.client.calls import (
    PLAN_TIMEOUT,
    Call,
    JobFilters,
    JobSettings,
    checked_id,
    hub_header,
    job_path,
    new_key,
    notify_headers,
    params_of,
    recipe_call,
)
from llmprune.service.client.recipe_input import text_of
from llmprune.service.client.server import Server
from llmprune.service.client.values import PlannedRun
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.sweeps.axes import Sweep
from llmprune.service.notifications.values import UserNotifications

if TYPE_CHECKING:
    from llmprune.service.client.recipe_input import RecipeInput

_PAGE = 100  # jobs


class AsyncClient(AsyncModelMethods, AsyncSweepMethods, AsyncUploadMethods, AsyncAccountMethods, AsyncUserMethods):
    """A client of a service, which can be used in ``async with``.

    ``server`` defaults to the variable LLMPRUNE_SERVER, or else to this machine; ``token`` to LLMPRUNE_TOKEN.
    ``timeout``: seconds without a sign of the service; ``pause`` waits between two attempts; ``transport`` replaces
    the network. A recipe is the path of a file, its text, a dictionary or a ``Recipe``. Every method raises
    ServiceError where the service refuses or cannot be reached, and RecipeError for wrong recipes and arguments.
    """

    def __init__(
        self,
        server: str | None = None,
        token: str | None = None,
        *,
        timeout: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Pause | None = None,
    ) -> None:
        known = Server.of(server, token)
        self.server = known.address
        self.connection = AsyncConnection(known, timeout=timeout, transport=transport, pause=pause)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self.connection.http.aclose()

    async def check(self, recipe: RecipeInput, overrides: Sequence[str] = ()) -> Validation:
        """Check a recipe against the schema and the service's policy; its model and text are not read."""
        call = recipe_call("/v1/recipes/validate", Validation, recipe=text_of(recipe, overrides))
        return await self.connection.ask(call)

    async def plan(self, recipe: RecipeInput, overrides: Sequence[str] = ()) -> PlannedRun:
        """Return the plan of a recipe: sizes, memory and notes. Raises RecipeError where it cannot be run."""
        recipe_text = text_of(recipe, overrides)
        call = recipe_call("/v1/recipes/plan", dict[str, Any], recipe=recipe_text, timeout=PLAN_TIMEOUT)
        answer = await self.connection.answer(call)
        return answer.json(PlannedRun).model_copy(update={"whole": answer.json(call.shape)})

    async def submit(
        self,
        recipe: RecipeInput,
        overrides: Sequence[str] = (),
        *,
        key: str | None = None,
        hub_token: str | None = None,
        **settings: Unpack[JobSettings],
    ) -> AsyncJobHandle:
        """Queue a recipe as a job. A lost answer makes the client send it again, and it is never queued twice.

        ``key``: idempotency key; default: a new one for each call. ``hub_token``: for this job alone.
        ``settings``: name, launcher, gpus, priority, time_limit, shared; notify_urls and notify_emails are told when it
        ends.
        """
        headers = new_key(key) | hub_header(hub_token) | notify_headers(settings)
        params, text = params_of(settings, JobSettings), text_of(recipe, overrides)
        params = {name: value for name, value in params.items() if not name.startswith("notify_")}
        call = recipe_call("/v1/jobs", Job, recipe=text, params=params, headers=headers)
        return AsyncJobHandle(self.connection, await self.connection.ask(call))

    async def job(self, job: str) -> AsyncJobHandle:
        """Return the job with this id."""
        return AsyncJobHandle(self.connection, await self.connection.ask(Call("GET", job_path(job), Job)))

    async def page(self, *, before: int | None = None, limit: int = 50, **filters: Unpack[JobFilters]) -> JobPage:
        """Return one page of jobs, the newest first. ``before``: the field ``next`` of the page before.

        ``filters``: state, owner, search, source, made_from.
        """
        params = params_of(filters, JobFilters) | {"before": before, "limit": limit}
        return await self.connection.ask(Call("GET", "/v1/jobs", JobPage, params))

    async def jobs(self, *, limit: int | None = None, **filters: Unpack[JobFilters]) -> AsyncIterator[AsyncJobHandle]:
        """Yield jobs, the newest first, and ask for further pages as they are needed.

        ``limit``: maximum number of jobs; ``filters``: as in ``page``.
        """
        before, left = None, limit
        while left is None or left > 0:
            page = await self.page(before=before, limit=_PAGE if left is None else min(_PAGE, left), **filters)
            for shown in page.jobs:
                yield AsyncJobHandle(self.connection, shown)
            before, left = page.next, None if left is None else left - len(page.jobs)
            if before is None:
                return

    async def queue(self) -> Queue:
        """Return the jobs by state, and which job holds which device."""
        return await self.connection.ask(Call("GET", "/v1/queue", Queue))

    async def compare(self, jobs: Sequence[str | AsyncJobHandle] | Sweep) -> Comparison:
        """Return the figures of several jobs, or of all jobs of a sweep, and how their recipes differ."""
        return await self.connection.ask(Call("GET", "/v1/compare", Comparison, {"job": _ids(jobs)}))

    async def compare_csv(self, jobs: Sequence[str | AsyncJobHandle] | Sweep) -> str:
        """Return all figures of these jobs as CSV, with the units in the heads."""
        return (await self.connection.answer(Call("GET", "/v1/compare.csv", str, {"job": _ids(jobs)}))).text()

    async def notifications(self) -> UserNotifications:
        """Return who is told when your jobs end that name nobody, and the secret that signs your webhooks."""
        return await self.connection.ask(Call("GET", "/v1/notifications", UserNotifications))

    async def set_notifications(self, *, urls: Sequence[str] = (), emails: Sequence[str] = ()) -> UserNotifications:
        """Replace who is told when your jobs end that name nobody."""
        targets = {"urls": list(urls), "emails": list(emails)}
        return await self.connection.ask(Call("PUT", "/v1/notifications", UserNotifications, json=targets))

    async def test_notifications(self) -> UserNotifications:
        """Send a test to these targets."""
        return await self.connection.ask(Call("POST", "/v1/notifications/test", UserNotifications))

    async def health(self) -> Health:
        """Return the version of a service that accepts and starts jobs. Raises ServiceBusy where it does not."""
        return await self.connection.ask(Call("GET", "/v1/ready", Health))


def _ids(jobs: Sequence[str | AsyncJobHandle] | Sweep) -> list[str]:
    """Return the ids of the jobs to compare."""
    chosen = [one.job for one in jobs.jobs] if isinstance(jobs, Sweep) else jobs
    return [checked_id(job if isinstance(job, str) else job.id) for job in chosen]
