"""Program of an attempt on a node of a cluster.

    python -m llmprune.service.artifacts.node TASK      (a NodeTask as JSON)

With a shared data folder it waits until no earlier attempt uses the run folder, and becomes the run. With an artefact
store it fetches the files of the newest manifest, runs, and publishes the run folder, the log and the progress. The
node's credentials for the store come from its own environment and never reach the run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from pydantic import BaseModel
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from llmprune.common.errors import LLMPruneError
from llmprune.results.run_folder.products import LOCK
from llmprune.service.artifacts.fetch import exclusive, fetch_use
from llmprune.service.artifacts.manifest import Manifest, fetch, keep_manifest, local_manifest, newest_manifest
from llmprune.service.artifacts.parts import Use
from llmprune.service.artifacts.publisher import Publisher, Reporter, Superseded, recipe_key, stop_key
from llmprune.service.artifacts.store import ArtifactStore, StoreUnreachable
from llmprune.service.environment import inherited

NODE_FOLDER = "LLMPRUNE_NODE_FOLDER"  # environment variable of a node: folder for the files of jobs
NO_STORE, SUPERSEDED = 75, 76  # exit codes: the store did not answer for too long; a later attempt has begun
_LOCK_SECONDS = 240.0  # a file server releases the locks of a dead node after one or two minutes
_LOOK_EVERY = 0.5  # seconds
_MAX_DELAY = 60.0

logger = logging.getLogger(__name__)


class NodeTask(BaseModel):
    """One attempt, as the launcher hands it to a node. It contains no secret."""

    job: str
    attempt: int
    data_dir: str  # of the service; the node's own folder takes its place where there is a store
    command: tuple[str, ...]
    environment: dict[str, str]
    keep_hub: bool
    log_limit: int
    store: str | None = None  # URL; None: the node sees the data folder
    uses: tuple[Use, ...] = ()  # files of other jobs that the command needs
    patience: float = 600.0  # seconds that the store may be away at the start and at the end


def main(arguments: list[str]) -> int:
    """Run the task; return the exit code of the run."""
    task = NodeTask.model_validate_json(arguments[0])
    return _run_shared(task) if task.store is None else _StoredAttempt(task, ArtifactStore(task.store)).run()


def _run_shared(task: NodeTask) -> int:
    """Become the run, in the data folder that this node shares with the service."""
    folder = Path(task.data_dir) / "jobs" / task.job
    if (folder / f"attempt-{task.attempt}.stopped").exists():
        return 1
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder / "nowhere")
    with _locked(folder / "run" / LOCK):
        pass
    os.execvpe(task.command[0], task.command, inherited(os.environ, task.keep_hub) | task.environment)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock; wait for an attempt on a lost node, whose lock the file server releases after a while."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _LOCK_SECONDS
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:  # the run itself then says that its folder is in use
                    break
                time.sleep(_LOOK_EVERY)
        yield


class _StoredAttempt:
    """An attempt on a node that shares no folder with the service."""

    def __init__(self, task: NodeTask, store: ArtifactStore) -> None:
        own = os.environ.get(NODE_FOLDER) or Path(tempfile.gettempdir()) / f"llmprune-{os.getuid()}"
        self.task, self.store, self.home = task, store, Path(own).absolute()
        self.folder = self.home / "jobs" / task.job
        self.publisher = Publisher(store, task.job, task.attempt, self.folder)
        self.reporter = Reporter(store, task.job, task.attempt, self.folder, task.log_limit)
        self._over = threading.Event()
        self._superseded = False
        self._users: dict[str, IO[str]] = {}  # locked files, by the job whose files are used

    def run(self) -> int:
        """Fetch, run and publish; return the exit code of the run."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        signal.signal(signal.SIGTERM, lambda *_: None)  # Ray sends it to the run too; this process ends after it
        try:
            self._insist(self._begin)
        except StoreUnreachable as error:
            return _without_store(error, self.folder)
        with _locked(self.home / "jobs" / f"{self.task.job}.lock"), ExitStack() as left:
            left.callback(self._leave_uses)
            try:
                if not self._insist(self._prepare):
                    return 1
                code = self._attempt()
                self._insist(self._finish)
            except StoreUnreachable as error:
                return _without_store(error, self.folder)
            except Superseded as error:
                print(f"llmprune: {error}; this attempt ends", file=sys.stderr)
                return SUPERSEDED
        shutil.rmtree(self.folder, ignore_errors=True)
        return code

    def _begin(self) -> bool:
        self.publisher.begin()
        return True

    def _prepare(self) -> bool:
        """Fetch recipe and run folders; return False where the attempt was cancelled, or cannot have what it needs."""
        if self.store.read(stop_key(self.task.job, self.task.attempt)) is not None:
            return False
        recipe = self.store.read(recipe_key(self.task.job))
        (self.folder / "recipe.yaml").write_bytes(recipe or b"")
        for name in ("log.txt", "progress.json"):
            (self.folder / name).unlink(missing_ok=True)
        self._fetch_own()
        self.publisher.last = newest_manifest(self.store, self.task.job)
        return self._fetch_uses()

    def _fetch_uses(self) -> bool:
        """Fetch what the command needs of other jobs; where the store lacks it, say so in the log and return False."""
        try:
            for use in self.task.uses:
                self._fetch_use(use)
        except StoreUnreachable:
            raise
        except LLMPruneError as error:
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"llmprune: {error}\n")
            self.reporter.report()
            return False
        return True

    def _fetch_own(self) -> None:
        """Make the run folder what the newest manifest lists, unless it is here and as new."""
        run_folder, newest = self.folder / "run", newest_manifest(self.store, self.task.job)
        here = local_manifest(self.folder)
        if newest is None or (here is not None and run_folder.is_dir() and _place(here) >= _place(newest)):
            return
        shutil.rmtree(run_folder, ignore_errors=True)
        damaged = fetch(self.store, newest, folder=run_folder)
        if damaged:
            shutil.rmtree(run_folder, ignore_errors=True)
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"the artefact store lacks {damaged[0]} of this job: it starts from the beginning\n")
        else:
            keep_manifest(self.folder, newest)

    def _attempt(self) -> int:
        """Run the command while two threads publish what it writes."""
        working_dir = self.folder / "nowhere"
        working_dir.mkdir(exist_ok=True)
        environment = {name: self._here(value) for name, value in self.task.environment.items()}
        with (self.folder / "log.txt").open("ab") as log:
            run = subprocess.Popen(
                [self._here(part) for part in self.task.command],
                cwd=working_dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=inherited(os.environ, self.task.keep_hub) | environment,
            )  # fmt: skip
        threads = [
            threading.Thread(target=self._repeat, args=(work, run), daemon=True)
            for work in (self.publisher.publish_changes, self.reporter.report)
        ]
        for thread in threads:
            thread.start()
        code = run.wait()
        self._over.set()
        for thread in threads:
            thread.join()
        if self._superseded:
            raise Superseded(f"a later attempt at job {self.task.job} has begun")
        return 128 - code if code < 0 else code

    def _fetch_use(self, use: Use) -> None:
        """Fetch files of another job, which stay as long as an attempt on this node needs them."""
        folder = self._used(use.job)
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        user = folder.with_suffix(".users").open("a")
        fcntl.flock(user, fcntl.LOCK_SH)  # released by _leave_uses, or when this process ends
        self._users[use.job] = user
        with exclusive(folder.with_suffix(".fetch")):
            fetch_use(self.store, use, run_folder=folder / "run")

    def _leave_uses(self) -> None:
        """Delete the files of other jobs that no attempt on this node needs any more."""
        for job, user in self._users.items():
            with user, suppress(BlockingIOError):
                fcntl.flock(user, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self._used(job), ignore_errors=True)
        self._users.clear()

    def _used(self, job: str) -> Path:
        return self.home / "used" / job

    def _here(self, text: str) -> str:
        """Return a text with this node's folders in place of the service's data folder."""
        data_dir = self.task.data_dir
        used = [(f"{data_dir}/jobs/{use.job}/run", str(self._used(use.job) / "run")) for use in self.task.uses]
        for old, new in (*used, (data_dir, str(self.home))):
            text = text.replace(old, new).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])  # overrides are JSON
        return text

    def _repeat(self, work: Callable[[], None], run: subprocess.Popen[bytes]) -> None:
        """Do work again and again until the run is over, more rarely while the store is away."""
        delay = _LOOK_EVERY
        while not self._over.wait(delay):
            try:
                work()
                delay = _LOOK_EVERY
            except (StoreUnreachable, OSError) as error:
                delay = min(_MAX_DELAY, 2 * delay)
                logger.warning("%s; trying again in %.0f s", error, delay)
            except Superseded:
                self._superseded = True
                run.kill()
                return

    def _finish(self) -> bool:
        if self.publisher.run_folder.is_dir():
            self.publisher.publish()
            self.publisher.sweep()
        self.reporter.report()
        return True

    def _insist(self, work: Callable[[], bool]) -> bool:
        """Do work, again and again while the store is away. Raises StoreUnreachable after the task's patience."""
        for attempt in Retrying(
            retry=retry_if_exception_type(StoreUnreachable),
            wait=wait_exponential(multiplier=_LOOK_EVERY, max=_MAX_DELAY),
            stop=stop_after_delay(self.task.patience),
            reraise=True,
        ):
            with attempt:
                return work()
        raise AssertionError("Retrying returns or raises")


def _without_store(error: StoreUnreachable, folder: Path) -> int:
    print(f"llmprune: {error}; its files are kept in {folder} on this node", file=sys.stderr)
    return NO_STORE


def _place(manifest: Manifest) -> tuple[int, int]:
    return manifest.attempt, manifest.number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
