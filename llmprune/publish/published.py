"""Record of a push: ``published.json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Published(BaseModel):
    """Commit on the hub that holds the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo_id: str
    commit: str
    url: str
    pull_request: str | None
    files: int
    bytes: int
    quantized: Published | None = None  # commit of the result in its base's format, in a repository of its own
