"""Program that fetches the run folder of a job from the artefact store, then becomes another program.

    python -m llmprune.service.artifacts.fetch TASK      (a FetchTask as JSON)

It runs on the service's machine, for work on a model that another machine made: a push.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pydantic import BaseModel

from llmprune.common.errors import LLMPruneError
from llmprune.service.artifacts.manifest import fetch, newest_manifest
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.environment import inherited


class FetchTask(BaseModel):
    """Jobs whose run folders are fetched into the data folder, and the command that then runs."""

    store: str
    data_dir: str
    jobs: tuple[str, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    keep_hub: bool


def main(arguments: list[str]) -> None:
    """Fetch, then become the command, without the credentials of the store."""
    task = FetchTask.model_validate_json(arguments[0])
    store = ArtifactStore(task.store)
    for job in task.jobs:
        fetch_job(store, job, run_folder=Path(task.data_dir) / "jobs" / job / "run")
    os.execvpe(task.command[0], task.command, inherited(os.environ, task.keep_hub) | task.environment)


def fetch_job(store: ArtifactStore, job: str, *, run_folder: Path) -> None:
    """Fetch the run folder of a job that ran elsewhere. Raises LLMPruneError where the store lacks a file of it."""
    manifest = newest_manifest(store, job)
    damaged = fetch(store, manifest, folder=run_folder) if manifest is not None else []
    if damaged:
        raise LLMPruneError(f"the artefact store lacks {damaged[0]} of job {job}; run its recipe again")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LLMPruneError as error:
        sys.exit(f"llmprune: {error}")
