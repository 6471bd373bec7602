"""Methods of the client for sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from llmprune.service.api.values import CancelledSweep
from llmprune.service.client.aio.connection import AsyncConnection
from llmprune.service.client.calls import (
    Call,
    SweepSettings,
    checked_id,
    hub_header,
    new_key,
    params_of,
    recipe_call,
    values_of,
)
from llmprune.service.client.recipe_input import text_of
from llmprune.service.jobs.sweeps.axes import Sweep, SweepSummary

if TYPE_CHECKING:
    from llmprune.service.client.recipe_input import RecipeInput

_LISTED = "client.sweeps() lists the newest"


class AsyncSweepMethods:
    """Sweeps: several jobs from one recipe, which differ in the values of some keys."""

    connection: AsyncConnection

    async def submit_sweep(
        self,
        recipe: RecipeInput,
        overrides: Sequence[str] = (),
        *,
        vary: Mapping[str, Sequence[object]] | Sequence[str],
        key: str | None = None,
        hub_token: str | None = None,
        **settings: Unpack[SweepSettings],
    ) -> Sweep:
        """Queue a job for every combination of values, all of them or none.

        ``vary``: values by key, as ``{"budget.parameters": [0.9, 0.8]}``, or texts as ``budget.parameters=0.9,0.8``.
        ``settings``: name, launcher, gpus, priority, time_limit, shared; ``key`` and ``hub_token``: as of ``submit``.
        """
        params = params_of(settings, SweepSettings) | {"vary": values_of(vary)}
        headers, text = new_key(key) | hub_header(hub_token), text_of(recipe, overrides)
        call = recipe_call("/v1/sweeps", Sweep, recipe=text, params=params, headers=headers)
        return await self.connection.ask(call)

    async def sweep(self, sweep: str) -> Sweep:
        """Return the sweep of this id with its jobs as they are now; ``compare`` takes it."""
        path = f"/v1/sweeps/{checked_id(sweep, kind='sweep', listed_by=_LISTED)}"
        return await self.connection.ask(Call("GET", path, Sweep))

    async def sweeps(self) -> list[SweepSummary]:
        """Return the newest sweeps."""
        return await self.connection.ask(Call("GET", "/v1/sweeps", list[SweepSummary]))

    async def cancel_sweep(self, sweep: str) -> int:
        """Cancel every job of a sweep that waits or runs; return how many."""
        path = f"/v1/sweeps/{checked_id(sweep, kind='sweep', listed_by=_LISTED)}/cancel"
        return (await self.connection.ask(Call("POST", path, CancelledSweep))).cancelled
