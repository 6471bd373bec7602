"""Where a result went: what a push leaves behind."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Published(BaseModel):
    """Where the result went."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo_id: str
    commit: str
    url: str
    pull_request: str | None
    files: int
    bytes: int
