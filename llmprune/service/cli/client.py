"""The service from Python, and under ``llmprune submit`` and its like.

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
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    Changed,
    Event,
    File,
    Page,
    ServiceError,
    Shown,
    Submitted,
    limited,
    lines_of,
)
from llmprune.service.cli.downloads import claim
from llmprune.service.jobs.job import ENDED, JOB_ID, State

__all__ = ["DEFAULT_SERVER", "ENDED", "Client", "ServiceError"]

DEFAULT_SERVER = "http://127.0.0.1:8321"
_TRIES = 6
_FIRST_PAUSE = 0.3  # seconds; doubles
_LONGEST_PAUSE = 10.0  # seconds that a service may ask for


class Client:
    """A connection to a service. ``token`` defaults to the variable LLMPRUNE_TOKEN."""

    def __init__(
        self, server: str = DEFAULT_SERVER, token: str | None = None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        token = token or os.environ.get("LLMPRUNE_TOKEN", "").strip()
        _require_plain(token, "the service's token")
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.server = server.rstrip("/")
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
        self, recipe: str, overrides: Sequence[str] = (), *, hub_token: str | None = None, **wishes: Any
    ) -> dict[str, Any]:
        """Queue a recipe's text; sent again by itself where the answer gets lost, and never queued twice.

        ``wishes``: name, launcher, gpus, priority, time_limit, shared.
        """
        headers = {"Content-Type": "application/yaml", "Idempotency-Key": uuid.uuid4().hex}
        headers |= _hub_header(hub_token)
        params = {name: value for name, value in wishes.items() if value is not None} | {"set": list(overrides)}
        return self._json(Submitted, "POST", path="/v1/jobs", params=params, content=recipe, headers=headers)

    def plan(self, recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """What a recipe would do. Raises RecipeError where it cannot be done."""
        headers = {"Content-Type": "application/yaml"}
        params = {"set": list(overrides)}
        path = "/v1/recipes/plan"
        return self._json(dict, "POST", path=path, params=params, content=recipe, headers=headers, timeout=300.0)

    def job(self, job: str) -> dict[str, Any]:
        """A job with its recipe."""
        return self._json(Shown, "GET", path=_path(job))

    def jobs(self, **filters: Any) -> dict[str, Any]:
        """A page of jobs; ``filters``: state, owner, search, source, before, limit."""
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
        """End a job."""
        return self._json(Changed, "POST", path=f"{_path(job)}/cancel")

    def retry(self, job: str, hub_token: str | None = None) -> dict[str, Any]:
        """Queue an ended job again."""
        return self._json(Changed, "POST", path=f"{_path(job)}/retry", headers=_hub_header(hub_token))

    def reevaluate(self, job: str, limit: int | None = None, *, hub_token: str | None = None) -> dict[str, Any]:
        """Evaluate more samples of a finished job's model, ``limit`` a task or as many as its gate needs."""
        params = {} if limit is None else {"limit": limit}
        return self._json(
            Changed, "POST", path=f"{_path(job)}/reevaluate", params=params, headers=_hub_header(hub_token)
        )

    def push(self, job: str, hub_token: str, **settings: Any) -> dict[str, Any]:
        """Push a finished job's model to the hub; the job that does it, which can be watched.

        ``settings``: those of the recipe's hub section, of which ``repo_id`` is needed.
        """
        headers = _hub_header(hub_token) | {"Idempotency-Key": uuid.uuid4().hex}
        given = {name: value for name, value in settings.items() if value is not None}
        return self._json(Submitted, "POST", path=f"{_path(job)}/push", json=given, headers=headers)

    def queue(self) -> dict[str, Any]:
        """What waits, and who holds which device."""
        return self._json(dict, "GET", path="/v1/queue")

    def compare(self, jobs: Sequence[str]) -> list[dict[str, Any]]:
        """The figures of several jobs."""
        answer = self._send("GET", "/v1/compare", params={"job": list(jobs)})
        found: list[dict[str, Any]] = answer.json(list[dict[str, Any]])
        return found

    def watch(self, job: str) -> Iterator[dict[str, Any]]:
        """A job's events until it has ended; goes on by itself where the connection breaks."""
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
            time.sleep(_FIRST_PAUSE * 2**failures)

    def log(self, job: str, offset: int = 0) -> tuple[str, int]:
        """A part of what a job printed, and where the next part begins."""
        answer = self._send("GET", f"{_path(job)}/log", params={"offset": offset})
        after = answer.headers.get("X-Next-Offset", "")
        if not re.fullmatch(r"\d{1,19}", after, re.ASCII):
            raise answer.makes_no_sense("no X-Next-Offset")
        return answer.body.decode("utf-8", "replace"), int(after)

    def artifacts(self, job: str) -> list[dict[str, Any]]:
        """Name and bytes of each file that the job's run wrote."""
        found: list[dict[str, Any]] = self._send("GET", f"{_path(job)}/artifacts").json(list[File])
        return found

    def fetch(self, job: str, folder: Path, *, names: Sequence[str] = ()) -> list[Path]:
        """Download files of a job, all of them by default, into a folder; whole ones are not fetched again.

        Raises OutputError where the folder has files of another job, or of this one before a retry.
        """
        finished = self.job(job).get("finished")
        there = {file["name"]: file["bytes"] for file in self.artifacts(job)}
        missing = [name for name in names if name not in there]
        if missing:
            raise RecipeError(f"job {job} has no {', '.join(missing)}; it has: {', '.join(there) or 'nothing yet'}")
        wanted = list(names or there)
        for name in wanted:
            if not is_plain_path(name) or not is_inside(folder / name, folder):
                raise ServiceError(f"the service named the file {name!r}, which lies outside {folder}")
        keep = claim(folder, job, finished=finished, names=wanted)
        return [self._download(job, name, size=there[name], folder=folder, keep=keep) for name in wanted]

    def _download(self, job: str, name: str, *, size: int, folder: Path, keep: bool) -> Path:
        path = folder / name
        beside = path.with_name(f".{path.name}.partial")
        try:
            if keep and path.is_file() and path.stat().st_size == size:
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(f"{_path(job)}/artifacts/{quote(name)}", beside, size=size)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}; choose another --output") from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        return path

    def _write(self, address: str, beside: Path, *, size: int) -> None:
        """Download a file that has ``size`` bytes. Raises ServiceError where it has more or fewer."""
        with beside.open("wb") as file, self._http.stream("GET", address) as response:
            if not response.is_success:
                raise Answer.read(response).refusal()
            for part in limited(response, size):
                file.write(part)
            if file.tell() != size:
                raise Answer.head(response).makes_no_sense(
                    f"{file.tell():,} bytes of a file listed with {size:,} (a job that still runs may have changed it)"
                )

    def _events(self, job: str, last: str) -> Iterator[dict[str, Any]]:
        headers = {"Last-Event-ID": last, "Accept": "text/event-stream"}
        with self._http.stream("GET", f"{_path(job)}/events", headers=headers) as response:
            if not response.is_success:
                raise Answer.read(response).refusal()
            head = Answer.head(response)
            kind = response.headers.get("Content-Type", "no content type")[:200]
            if not kind.startswith("text/event-stream"):
                raise head.makes_no_sense(f"{kind} and no stream of events")
            fields: dict[str, str] = {}
            for line in lines_of(response):
                name, _, value = line.partition(":")
                if name in ("data", "event", "id"):
                    fields[name] = value.removeprefix(" ")
                elif line:
                    continue  # a comment, or a field that no event of the service has
                elif "data" in fields:
                    event = replace(head, body=fields["data"].encode()).json(Event)
                    number = fields.get("id", last)
                    if not re.fullmatch(r"\d{1,19}", number, re.ASCII):
                        raise head.makes_no_sense(f"an event with the id {number[:200]!r}")
                    yield event | {"event": fields.get("event", "message"), "event_id": number}
                    fields = {}

    def _json(self, shape: Any, method: str, *, path: str, **request: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._send(method, path, **request).json(shape)
        return found

    def _send(self, method: str, path: str, **request: Any) -> Answer:
        """The answer; tried again where the service is away or asks for patience, for every call here allows that."""
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
                time.sleep(_FIRST_PAUSE * 2**attempt)
                continue
            if response.is_success:
                return answer
            if last or answer.status not in (429, 503, 507):
                raise answer.refusal()
            asked = retry_after_seconds(answer.headers.get("Retry-After", ""))
            time.sleep(min(1.0 if asked is None else asked, _LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, error: Exception) -> ServiceError:
        why = f"{self.server} cannot be reached"
        if isinstance(error, httpx.ReadError | httpx.ReadTimeout | httpx.RemoteProtocolError):
            why = f"{self.server} does not finish its answer"
        return ServiceError(f"{why}: {error or type(error).__name__}; is llmprune serve running there? see --server")


def _path(job: str) -> str:
    """The path of a job. Raises RecipeError where no job can have this id."""
    if not re.fullmatch(JOB_ID, job):
        raise RecipeError(
            f"there is no job {job!r}: an id is 12 of the digits 0-9 and letters a-f; llmprune jobs lists them"
        )
    return f"/v1/jobs/{job}"


def _hub_header(token: str | None) -> dict[str, str]:
    _require_plain(token or "", "the hub token")
    return {"X-Hub-Token": token} if token else {}


def _require_plain(token: str, what: str) -> None:
    """Raise RecipeError for a token that cannot stand in a header."""
    if not re.fullmatch(r"[!-~]*", token):
        raise RecipeError(f"{what} has blanks, line breaks or letters that no token has; copy it again")
