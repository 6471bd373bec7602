"""Methods of the client for the model library."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Unpack

from llmprune.service.api.values import DeletedModels, ModelList
from llmprune.service.client.aio.connection import AsyncConnection
from llmprune.service.client.calls import Call, LabelChanges, ModelFilters, checked_id, params_of, without_nothing
from llmprune.service.jobs.library.models import Model

_PAGE = 100  # models


class AsyncModelMethods:
    """Models of the library: lists, labels, and changes of several models at once."""

    connection: AsyncConnection

    async def model(self, job: str) -> Model:
        """Return the model that this job has made, with its labels."""
        return await self.connection.ask(Call("GET", f"/v1/models/{checked_id(job)}", Model))

    async def model_page(
        self, *, after: str | None = None, limit: int = 50, **filters: Unpack[ModelFilters]
    ) -> ModelList:
        """Return one page of the library. ``after``: the field ``next`` of the page before, with the same order.

        ``filters``: search, stage, tag, base, owner; sort, such as retention or size; order, asc or desc.
        """
        params = params_of(filters, ModelFilters) | {"after": after, "limit": limit}
        return await self.connection.ask(Call("GET", "/v1/models", ModelList, params))

    async def models(self, *, limit: int | None = None, **filters: Unpack[ModelFilters]) -> AsyncIterator[Model]:
        """Yield the models of the library, and ask for further pages as they are needed.

        ``limit``: maximum number of models; ``filters``: as in ``model_page``.
        """
        after, left = None, limit
        while left is None or left > 0:
            page = await self.model_page(after=after, limit=_PAGE if left is None else min(_PAGE, left), **filters)
            for model in page.models:
                yield model
            after, left = page.next, None if left is None else left - len(page.models)
            if after is None:
                return

    async def label(self, job: str, **labels: Unpack[LabelChanges]) -> Model:
        """Change the labels of a model. ``labels``: stage, tags, add_tags, remove_tags, notes."""
        changes = without_nothing(params_of(labels, LabelChanges))
        return await self.connection.ask(Call("PATCH", f"/v1/models/{checked_id(job)}", Model, json=changes))

    async def label_models(self, jobs: Sequence[str], **labels: Unpack[LabelChanges]) -> list[Model]:
        """Change the labels of several models, of all of them or of none."""
        changes = without_nothing(params_of(labels, LabelChanges))
        asked = {"jobs": [checked_id(job) for job in jobs], "labels": changes}
        return await self.connection.ask(Call("POST", "/v1/models/label", list[Model], json=asked))

    async def delete_models(self, jobs: Sequence[str]) -> int:
        """Delete several models with their jobs and all files, all of them or none; return how many."""
        asked = {"jobs": [checked_id(job) for job in jobs]}
        return (await self.connection.ask(Call("POST", "/v1/models/delete", DeletedModels, json=asked))).deleted
