"""Python client of the service, which the commands such as ``llmprune submit`` also use.

from llmprune.service.cli.client import Client
with Client("http://127.0.0.1:8321") as client:
    job = client.submit(Path("recipe.yaml").read_text())
    for event in client.watch(job["id"]): ...
    client.fetch(job["id"], Path("results"))
    push = client.push(job["id"], hub_token, repo_id="org/pruned")
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, get_args
from urllib.parse import quote

import httpx2 as httpx

from llmprune.common.errors import OutputError, RecipeError, did_you_mean
from llmprune.common.hub.errors import retry_after_seconds
from llmprune.common.paths import is_inside, is_plain_path
from llmprune.common.waiting import announce_wait
from llmprune.service.cli.answers import (
    Answer,
    ChangedJob,
    File,
    Page,
    ServiceError,
    ShownJob,
    SubmittedJob,
    limited,
)
from llmprune.service.cli.downloads import claim
from llmprune.service.cli.event_stream import events_of
from llmprune.service.jobs.job import ENDED, JOB_ID, State

__all__ = ["DEFAULT_SERVER", "ENDED", "Client", "ServiceError"]

DEFAULT_SERVER = "http://127.0.0.1:8321"
_TRIES = 6
_FIRST_PAUSE = 0.3  # seconds; doubles
_LONGEST_PAUSE = 10.0  # seconds that a service may ask for


class Client:
    """A connection to a service. ``token`` defaults to the variable LLMPRUNE_TOKEN.

    ``sleep`` waits between two tries, and ``transport`` replaces the network.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        token: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        token = token or os.environ.get("LLMPRUNE_TOKEN", "").strip()
        _require_plain(token, "the service's token")
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.server = server.rstrip("/")
        self._sleep = sleep
        if not re.match(r"https?://[^/]", self.server):
            raise RecipeError(f"--server {server!r}: give a URL such as {DEFAULT_SERVER}")
        try:
            self._http = httpx.Client(base_url=self.server, headers=headers, timeout=60.0, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise RecipeError(f"--server {server}: {error}; give a URL such as {DEFAULT_SERVER}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(
        self, recipe: str, overrides: Sequence[str] = (), *, hub_token: str | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Submit the text of a recipe. A lost answer makes the client send it again, and it is never queued twice.

        ``settings``: name, launcher, gpus, priority, time_limit, shared.
        """
        headers = {"Content-Type": "application/yaml", "Idempotency-Key": uuid.uuid4().hex}
        headers |= _hub_header(hub_token)
        params = {name: value for name, value in settings.items() if value is not None} | {"set": list(overrides)}
        return self._json(SubmittedJob, "POST", path="/v1/jobs", params=params, content=recipe, headers=headers)

    def plan(self, recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Return the plan of a recipe. Raises RecipeError where it cannot be run."""
        headers = {"Content-Type": "application/yaml"}
        params = {"set": list(overrides)}
        path = "/v1/recipes/plan"
        return self._json(dict, "POST", path=path, params=params, content=recipe, headers=headers, timeout=300.0)

    def job(self, job: str) -> dict[str, Any]:
        """Return a job with its recipe."""
        return self._json(ShownJob, "GET", path=_path(job))

    def jobs(self, **filters: Any) -> dict[str, Any]:
        """Return a page of jobs. ``filters``: state, owner, search, source, before, limit."""
        given = {name: value for name, value in filters.items() if value is not None}
        states = given.get("state", ())
        for state in (states,) if isinstance(states, str) else states:
            if state not in get_args(State):
                near = did_you_mean(state, get_args(State))
                raise RecipeError(
                    f"--state {state!r}: there is no such state; choose {', '.join(get_args(State))}{near}"
                )
        return self._json(Page, "GET", path="/v1/jobs", params=given)

    def cancel(self, job: str) -> dict[str, Any]:
        """Cancel a job."""
        return self._json(ChangedJob, "POST", path=f"{_path(job)}/cancel")

    def retry(self, job: str, hub_token: str | None = None) -> dict[str, Any]:
        """Queue an ended job again."""
        return self._json(ChangedJob, "POST", path=f"{_path(job)}/retry", headers=_hub_header(hub_token))

    def reevaluate(self, job: str, limit: int | None = None, *, hub_token: str | None = None) -> dict[str, Any]:
        """Evaluate a finished job's model on more samples: ``limit`` for each task, or as many as its gate needs."""
        params = {} if limit is None else {"limit": limit}
        return self._json(
            ChangedJob, "POST", path=f"{_path(job)}/reevaluate", params=params, headers=_hub_header(hub_token)
        )

    def share(self, job: str, shared: bool) -> dict[str, Any]:
        """Let every user read a job, or only its owner and admins."""
        return self._json(ChangedJob, "POST", path=f"{_path(job)}/{'share' if shared else 'unshare'}")

    def push(self, job: str, hub_token: str, **settings: Any) -> dict[str, Any]:
        """Push a finished job's model to the hub; return the job of the push, which can be watched.

        ``settings``: those of a recipe's hub section; ``repo_id`` is required.
        """
        headers = _hub_header(hub_token) | {"Idempotency-Key": uuid.uuid4().hex}
        given = {name: value for name, value in settings.items() if value is not None}
        return self._json(SubmittedJob, "POST", path=f"{_path(job)}/push", json=given, headers=headers)

    def queue(self) -> dict[str, Any]:
        """Return the jobs by state, and which job holds which device."""
        return self._json(dict, "GET", path="/v1/queue")

    def compare(self, jobs: Sequence[str]) -> list[dict[str, Any]]:
        """Return the figures of several jobs."""
        answer = self._send("GET", "/v1/compare", params={"job": list(jobs)})
        found: list[dict[str, Any]] = answer.json(list[dict[str, Any]])
        return found

    def watch(self, job: str) -> Iterator[dict[str, Any]]:
        """Yield a job's events until it has ended; reconnects where the connection breaks."""
        last, failures = "0", 0
        while True:
            try:
                for event in self._events(job, last):
                    last, failures = event["event_id"], 0
                    yield event
                if self.job(job)["state"] in ENDED:
                    return
            except httpx.TransportError as error:
                failures += 1
                if failures >= _TRIES:
                    raise self._unreachable(error) from error
            self._sleep(_FIRST_PAUSE * 2**failures)

    def log(self, job: str, offset: int = 0) -> tuple[str, int]:
        """Return a part of a job's log, and the offset of the next part."""
        answer = self._send("GET", f"{_path(job)}/log", params={"offset": offset})
        after = answer.headers.get("X-Next-Offset", "")
        if not re.fullmatch(r"\d{1,19}", after, re.ASCII):
            raise answer.unreadable("no X-Next-Offset")
        return answer.body.decode("utf-8", "replace"), int(after)

    def artifacts(self, job: str) -> list[dict[str, Any]]:
        """Return name and bytes of each file that the job's run wrote."""
        found: list[dict[str, Any]] = self._send("GET", f"{_path(job)}/artifacts").json(list[File])
        return found

    def fetch(self, job: str, folder: Path, *, names: Sequence[str] = ()) -> list[Path]:
        """Download files of a job into a folder, by default all of them; complete files are not downloaded again.

        Raises OutputError where the folder has files of another job, or of this job before a retry.
        """
        finished = self.job(job).get("finished")
        sizes = {file["name"]: file["bytes"] for file in self.artifacts(job)}
        missing = [name for name in names if name not in sizes]
        if missing:
            raise RecipeError(f"job {job} has no {', '.join(missing)}; it has: {', '.join(sizes) or 'nothing yet'}")
        wanted = list(names or sizes)
        for name in wanted:
            if not is_plain_path(name) or not is_inside(folder / name, folder):
                raise ServiceError(f"the service named the file {name!r}, which is outside {folder}")
        keep = claim(folder, job, finished=finished, names=wanted)
        return [self._download(job, name, size=sizes[name], folder=folder, keep=keep) for name in wanted]

    def _download(self, job: str, name: str, *, size: int, folder: Path, keep: bool) -> Path:
        path = folder / name
        partial = path.with_name(f".{path.name}.partial")
        try:
            if keep and path.is_file() and path.stat().st_size == size:
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(f"{_path(job)}/artifacts/{quote(name)}", partial, size=size)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}; choose another --output") from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        return path

    def _write(self, address: str, partial: Path, *, size: int) -> None:
        """Download a file of ``size`` bytes. Raises ServiceError where it has more or fewer."""
        with partial.open("wb") as file, self._http.stream("GET", address) as response:
            if not response.is_success:
                raise Answer.read(response).refusal()
            for part in limited(response, size):
                file.write(part)
            if file.tell() != size:
                raise Answer.head(response).unreadable(
                    f"{file.tell():,} bytes of a file listed with {size:,} (a job that still runs may have changed it)"
                )

    def _events(self, job: str, last: str) -> Iterator[dict[str, Any]]:
        headers = {"Last-Event-ID": last, "Accept": "text/event-stream"}
        with self._http.stream("GET", f"{_path(job)}/events", headers=headers) as response:
            if not response.is_success:
                raise Answer.read(response).refusal()
            yield from events_of(response, last)

    def _json(self, shape: Any, method: str, *, path: str, **request: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._send(method, path, **request).json(shape)
        return found

    def _send(self, method: str, path: str, **request: Any) -> Answer:
        """Return the answer. Every call is safe to repeat, so it is where the service does not answer or is busy."""
        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1
            try:
                with (
                    announce_wait(self.server, f"{method} {path}"),
                    self._http.stream(method, path, **request) as response,
                ):
                    answer = Answer.read(response)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                if last or not isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
                    raise self._unreachable(error) from error
                self._sleep(_FIRST_PAUSE * 2**attempt)
                continue
            if response.is_success:
                return answer
            if last or answer.status not in (429, 503, 507):
                raise answer.refusal()
            wait = retry_after_seconds(answer.headers.get("Retry-After", ""))
            self._sleep(min(1.0 if wait is None else wait, _LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, error: Exception) -> ServiceError:
        why = f"{self.server} cannot be reached"
        if isinstance(error, httpx.ReadError | httpx.ReadTimeout | httpx.RemoteProtocolError):
            why = f"{self.server} does not finish its answer"
        return ServiceError(f"{why}: {error or type(error).__name__}; is llmprune serve running there? see --server")


def _path(job: str) -> str:
    """Return the path of a job. Raises RecipeError where no job can have this id."""
    if not re.fullmatch(JOB_ID, job):
        raise RecipeError(
            f"there is no job {job!r}: an id is 12 of the digits 0-9 and letters a-f; llmprune jobs lists them"
        )
    return f"/v1/jobs/{job}"


def _hub_header(token: str | None) -> dict[str, str]:
    _require_plain(token or "", "the hub token")
    return {"X-Hub-Token": token} if token else {}


def _require_plain(token: str, what: str) -> None:
    """Raise RecipeError for a token that a header cannot hold."""
    if not re.fullmatch(r"[!-~]*", token):
        raise RecipeError(f"{what} has spaces, line breaks or letters that no token has; copy it again")
