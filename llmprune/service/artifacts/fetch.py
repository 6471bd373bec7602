"""Files of other jobs that an attempt needs, fetched from the artefact store into the folder of the attempt's job.

    python -m llmprune.service.artifacts.fetch TASK      (a FetchTask as JSON)

The program fetches what the data folder lacks, then becomes the command, in which the fetched folders take the place of
those in the data folder. It runs on the service's machine; nodes call ``fetch_use``. A fetch that was killed continues
with the next file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.artifacts.manifest import fetch, local_manifest, newest_manifest
from llmprune.service.artifacts.parts import Use
from llmprune.service.artifacts.store import ArtifactStore, StoreUnreachable
from llmprune.service.environment import inherited

FETCHED = "fetched"  # folder of fetched run folders, in the folder of the job that needs them


class FetchTask(BaseModel):
    """Files that a job needs of others, and the command that then runs."""

    store: str
    data_dir: str
    job: str
    uses: tuple[Use, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    keep_hub: bool


def main(arguments: list[str]) -> None:
    """Fetch, then become the command, without the credentials of the store."""
    task = FetchTask.model_validate_json(arguments[0])
    jobs, places = Path(task.data_dir) / "jobs", {}
    for use in task.uses:
        if not is_here(jobs / use.job, use):
            places[str(jobs / use.job / "run")] = str(fetched_folder(jobs / task.job, use))
            fetch_use(ArtifactStore(task.store), use, folder=jobs / task.job)
    command = relocated(task.command, places)
    os.execvpe(command[0], command, inherited(os.environ, task.keep_hub) | task.environment)


def is_here(folder: Path, use: Use) -> bool:
    """Return whether the data folder has all files that are needed of a job. ``folder``: of that job."""
    run_folder, manifest = folder / "run", local_manifest(folder)
    if manifest is None:  # it ran on this machine
        return run_folder.is_dir()
    needed = [file for file in manifest.files if use.includes(file.name)]
    return all(_size(run_folder / file.name) == file.bytes for file in needed)


def fetched_folder(folder: Path, use: Use) -> Path:
    """Return the place of a fetched run folder. ``folder``: of the job that needs it."""
    return folder / FETCHED / use.job / "run"


def fetch_use(store: ArtifactStore, use: Use, *, folder: Path) -> None:
    """Fetch the files that are needed of a job, and compare sizes and checksums.

    ``folder``: of the job that needs them. Raises StoreUnreachable, DiskError, and LLMPruneError where the store lacks
    a file.
    """
    try:
        manifest = newest_manifest(store, use.job)
        if manifest is None:
            raise StoreUnreachable(f"the artefact store {store.url} shows no files; check that it is the right one")
        target = fetched_folder(folder, use)
        damaged = fetch(store, manifest, folder=target, wanted=lambda file: use.includes(file.name))
    except StoreUnreachable as error:
        raise StoreUnreachable(f"{error}; files of job {use.job} are only there: retry when it has them") from error
    except OSError as error:
        raise DiskError(f"the files of job {use.job} cannot be written: {error}; free some space and retry") from error
    if damaged:
        raise LLMPruneError(f"the artefact store lacks {damaged[0]} of job {use.job}; run its recipe again")


def drop_fetched(folder: Path) -> None:
    """Delete what was fetched for a job. ``folder``: of the job."""
    shutil.rmtree(folder / FETCHED, ignore_errors=True)


def relocated(command: Sequence[str], places: Mapping[str, str]) -> tuple[str, ...]:
    """Return a command with other folders in its paths, in JSON too. ``places``: new folders by old ones."""
    forms = {form(old): form(new) for old, new in places.items() for form in (str, _in_json)}
    found = []
    for word in command:
        for old, new in forms.items():
            word = word.replace(old, new)
        found.append(word)
    return tuple(found)


def _in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LLMPruneError as error:
        sys.exit(f"llmprune: {error}")
