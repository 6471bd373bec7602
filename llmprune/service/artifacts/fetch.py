"""Files of other jobs that an attempt needs, fetched from the artefact store to where those jobs have their files.

    python -m llmprune.service.artifacts.fetch TASK      (a FetchTask as JSON)

The program fetches what the data folder lacks, then becomes the command. It runs on the service's machine; nodes call
``fetch_use``. Reports name the paths of these files, so they have the same place for every job. A fetch that was killed
continues with the next file.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.artifacts.manifest import Manifest, fetch, local_manifest, newest_manifest, partial_of
from llmprune.service.artifacts.mirror import is_copied
from llmprune.service.artifacts.parts import Use
from llmprune.service.artifacts.store import ArtifactStore, StoreUnreachable
from llmprune.service.environment import inherited

FETCHED = "fetched"  # empty file in the folder of a job whose files were fetched for others


class FetchTask(BaseModel):
    """Files that a job needs of others, and the command that then runs."""

    store: str
    data_dir: str
    uses: tuple[Use, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    keep_hub: bool


def main(arguments: list[str]) -> None:
    """Fetch, then become the command, without the credentials of the store."""
    task = FetchTask.model_validate_json(arguments[0])
    for use in task.uses:
        folder = Path(task.data_dir) / "jobs" / use.job
        if not is_here(folder, use):
            folder.mkdir(exist_ok=True)
            with exclusive(folder / "fetch.lock"):  # another job may need the same files
                (folder / FETCHED).touch()
                fetch_use(ArtifactStore(task.store), use, run_folder=folder / "run")
    os.execvpe(task.command[0], task.command, inherited(os.environ, task.keep_hub) | task.environment)


def is_here(folder: Path, use: Use) -> bool:
    """Return whether the data folder has all files that are needed of a job. ``folder``: of that job."""
    run_folder, manifest = folder / "run", local_manifest(folder)
    if manifest is None:  # it ran on this machine
        return run_folder.is_dir()
    needed = [file for file in manifest.files if use.includes(file.name)]
    return all(_size(run_folder / file.name) == file.bytes for file in needed)


def fetch_use(store: ArtifactStore, use: Use, *, run_folder: Path) -> Manifest:
    """Fetch the files that are needed of a job, and compare sizes and checksums; return the manifest that lists them.

    ``run_folder``: of that job. Raises StoreUnreachable, DiskError, and LLMPruneError where the store lacks a file.
    """
    try:
        manifest = newest_manifest(store, use.job)
        if manifest is None:
            raise StoreUnreachable(f"the artefact store {store.url} shows no files; check that it is the right one")
        damaged = fetch(store, manifest, folder=run_folder, wanted=lambda file: use.includes(file.name))
    except StoreUnreachable as error:
        raise StoreUnreachable(f"{error}; files of job {use.job} are only there: retry when it has them") from error
    except OSError as error:
        raise DiskError(f"the files of job {use.job} cannot be written: {error}; free some space and retry") from error
    if damaged:
        raise LLMPruneError(f"the artefact store lacks {damaged[0]} of job {use.job}; run its recipe again")
    return manifest


def remove_fetched(folder: Path) -> None:
    """Remove what was fetched of a job that ran on another machine; the copies of small files stay.

    ``folder``: of that job. The store has the files.
    """
    run_folder, manifest = folder / "run", local_manifest(folder)
    for file in manifest.files if manifest is not None else ():
        if not is_copied(file):
            path = run_folder / file.name
            for one in (path, partial_of(path)):
                one.unlink(missing_ok=True)
    shutil.rmtree(run_folder / "model", ignore_errors=True)  # with its folders
    (folder / FETCHED).unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that no other process has at the same time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
