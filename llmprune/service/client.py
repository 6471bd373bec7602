"""The service from Python, and under ``llmprune submit`` and its like.

from llmprune.service.client import Client
with Client("http://127.0.0.1:8321") as client:
    job = client.submit(Path("recipe.yaml").read_text())
    for event in client.watch(job["id"]): ...
    client.fetch(job["id"], Path("results"))
    push = client.push(job["id"], hub_token, repo_id="org/pruned")
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx2 as httpx

from llmprune.errors import LLMPruneError, OutputError, RecipeError
from llmprune.names import is_plain, lies_inside

DEFAULT_SERVER = "http://127.0.0.1:8321"
ENDED = ("cancelled", "failed", "gate_not_met", "gate_undecided", "succeeded")
_TRIES = 6
_FIRST_PAUSE = 0.3  # seconds; doubles


class ServiceError(LLMPruneError):
    """The service said no, or cannot be reached."""


class Client:
    """A connection to a service. ``token`` defaults to the variable LLMPRUNE_TOKEN."""

    def __init__(
        self, server: str = DEFAULT_SERVER, token: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        token = token or os.environ.get("LLMPRUNE_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.server = server.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self.server, headers=headers, timeout=60.0, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise RecipeError(f"--server {server}: {error}; give a URL such as {DEFAULT_SERVER}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(
        self, recipe: str, overrides: Sequence[str] = (), hub_token: str | None = None, **wishes: Any
    ) -> dict[str, Any]:
        """Queue a recipe's text; sent again by itself where the answer gets lost, and never queued twice.

        ``wishes``: name, launcher, gpus, priority, time_limit, shared.
        """
        headers = {"Content-Type": "application/yaml", "Idempotency-Key": uuid.uuid4().hex}
        if hub_token:
            headers["X-Hub-Token"] = hub_token
        given = {name: value for name, value in wishes.items() if value is not None}
        return self._json("POST", "/v1/jobs", params=given | {"set": list(overrides)}, content=recipe, headers=headers)

    def plan(self, recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """What a recipe would do. Raises RecipeError where it cannot be done."""
        headers = {"Content-Type": "application/yaml"}
        params = {"set": list(overrides)}
        return self._json("POST", "/v1/recipes/plan", params=params, content=recipe, headers=headers, timeout=300.0)

    def job(self, job: str) -> dict[str, Any]:
        """A job with its recipe."""
        return self._json("GET", f"/v1/jobs/{job}")

    def jobs(self, **filters: Any) -> dict[str, Any]:
        """A page of jobs; ``filters``: state, owner, search, source, before, limit."""
        return self._json("GET", "/v1/jobs", params={name: v for name, v in filters.items() if v is not None})

    def cancel(self, job: str) -> dict[str, Any]:
        """End a job."""
        return self._json("POST", f"/v1/jobs/{job}/cancel")

    def retry(self, job: str, hub_token: str | None = None) -> dict[str, Any]:
        """Queue an ended job again."""
        return self._json("POST", f"/v1/jobs/{job}/retry", headers={"X-Hub-Token": hub_token} if hub_token else {})

    def reevaluate(self, job: str, limit: int | None = None, hub_token: str | None = None) -> dict[str, Any]:
        """Evaluate more samples of a finished job's model, ``limit`` a task or as many as its gate needs."""
        headers = {"X-Hub-Token": hub_token} if hub_token else {}
        params = {} if limit is None else {"limit": limit}
        return self._json("POST", f"/v1/jobs/{job}/reevaluate", params=params, headers=headers)

    def push(self, job: str, hub_token: str, **settings: Any) -> dict[str, Any]:
        """Push a finished job's model to the hub; the job that does it, which can be watched.

        ``settings``: those of the recipe's hub section, of which ``repo_id`` is needed.
        """
        headers = {"X-Hub-Token": hub_token, "Idempotency-Key": uuid.uuid4().hex}
        given = {name: value for name, value in settings.items() if value is not None}
        return self._json("POST", f"/v1/jobs/{job}/push", json=given, headers=headers)

    def queue(self) -> dict[str, Any]:
        """What waits, and who holds which device."""
        return self._json("GET", "/v1/queue")

    def compare(self, jobs: Sequence[str]) -> list[dict[str, Any]]:
        """The figures of several jobs."""
        found: list[dict[str, Any]] = self._send("GET", "/v1/compare", params={"job": list(jobs)}).json()
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
        response = self._send("GET", f"/v1/jobs/{job}/log", params={"offset": offset})
        return response.text, int(response.headers["X-Next-Offset"])

    def artifacts(self, job: str) -> list[dict[str, Any]]:
        """Name and bytes of each file that the job's run wrote."""
        found: list[dict[str, Any]] = self._send("GET", f"/v1/jobs/{job}/artifacts").json()
        return found

    def fetch(self, job: str, folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """Download files of a job, all of them by default, into a folder; whole ones are not fetched again."""
        there = {file["name"]: file["bytes"] for file in self.artifacts(job)}
        missing = [name for name in names if name not in there]
        if missing:
            raise RecipeError(f"job {job} has no {', '.join(missing)}; it has: {', '.join(there) or 'nothing yet'}")
        return [self._download(job, name, there[name], folder) for name in (names or there)]

    def _download(self, job: str, name: str, size: int, folder: Path) -> Path:
        path = folder / name
        if not is_plain(name) or not lies_inside(path, folder):
            raise ServiceError(f"the service named the file {name!r}, which lies outside {folder}")
        beside = path.with_name(f".{path.name}.partial")
        address = f"/v1/jobs/{job}/artifacts/{quote(name)}"
        try:
            if path.is_file() and path.stat().st_size == size:
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file, self._http.stream("GET", address) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                for part in response.iter_bytes():
                    file.write(part)
            beside.replace(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}; choose another --output") from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        return path

    def _events(self, job: str, last: str) -> Iterator[dict[str, Any]]:
        headers = {"Last-Event-ID": last, "Accept": "text/event-stream"}
        with self._http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as response:
            if response.is_error:
                response.read()
                raise _refusal(response)
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    yield json.loads(fields["data"]) | {"event": fields["event"], "event_id": fields["id"]}
                    fields = {}

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._send(method, path, **request).json()
        return found

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer; tried again where the service is away or asks for patience, for every call here allows that."""
        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1
            try:
                response = self._http.request(method, path, **request)
            except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                if last or not isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
                    raise self._unreachable(error) from error
                time.sleep(_FIRST_PAUSE * 2**attempt)
                continue
            if response.is_success:
                return response
            if last or response.status_code not in (429, 503, 507):
                raise _refusal(response)
            time.sleep(min(float(response.headers.get("Retry-After", 1)), 10.0))
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, error: Exception) -> ServiceError:
        return ServiceError(f"{self.server} cannot be reached: {error}; is llmprune serve running there? see --server")


def _refusal(response: httpx.Response) -> LLMPruneError:
    """A problem as the error that it is."""
    try:
        problem = response.json()
        detail, problems = str(problem["detail"]), list(problem["problems"])
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"the service answered {response.status_code}: {response.text[:200]}")
    if response.status_code == 422 and problems:
        return RecipeError(problems, "recipe")
    hint = "; set LLMPRUNE_TOKEN or give --token-file" if response.status_code == 401 else ""
    return ServiceError(f"the service refused: {detail}{hint}")
