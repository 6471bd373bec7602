"""Client of Ray's job API and of its list of nodes, over HTTP.

Ray's own client has no time-outs: one lost packet would block the supervision of all jobs.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any, Literal

import httpx2 as httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmprune.common.errors import LLMPruneError

logger = logging.getLogger(__name__)

_TIMEOUT = httpx.Timeout(5.0, connect=3.0)  # seconds, for the supervisor waits for each answer
SUBMIT_TIMEOUT = httpx.Timeout(30.0, connect=3.0)  # Ray answers once it has made an actor, slowly on a busy head


@dataclass(frozen=True)
class RayTiming:
    """Seconds between two requests, so that a slow cluster does not block the supervisor."""

    poll_every: float = 2.0  # for each job
    pause: float = 10.0  # after a request that was not answered
    nodes_every: float = 30.0  # for the list of nodes


DEFAULT_TIMING = RayTiming()


class Details(BaseModel):
    """State of a job in an answer of Ray; fields that are not used are left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    status: Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
    driver_exit_code: int | None = Field(None, ge=-255, le=255)
    driver_node_id: str | None = None
    error_type: str | None = None
    message: str | None = None


class Node(BaseModel):
    """A node of a cluster."""

    model_config = ConfigDict(extra="ignore")

    node_id: str
    node_ip: str = "?"
    state: str
    resources_total: dict[str, float] = Field(default_factory=dict)

    @property
    def is_alive(self) -> bool:
        """True where jobs can run on it."""
        return self.state == "ALIVE"

    @property
    def gpus(self) -> int:
        """Number of its GPUs."""
        return int(self.resources_total.get("GPU", 0))


class _Nodes(BaseModel):
    result: list[Node]


class _NodeAnswer(BaseModel):
    class Data(BaseModel):
        """Inner part of the answer."""

        result: _Nodes

    data: Data


class RayApi:
    """Requests to one cluster. After one without an answer the cluster is not asked for a while."""

    def __init__(self, address: str, *, timing: RayTiming, transport: httpx.BaseTransport | None = None) -> None:
        self.address, self.timing = address.rstrip("/"), timing
        token = os.environ.get("RAY_AUTH_TOKEN")  # for clusters that require one
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=_TIMEOUT, transport=transport)
        self._silent_until: float | None = None

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """Return the answer; None where there is none, it is no answer of Ray's job API, or the token is wrong."""
        if self._silent_until is not None and time.monotonic() < self._silent_until:
            return None
        try:
            answer = self._http.request(method, path, **request)
            wrong = _not_ray(answer)
        except (httpx.TransportError, httpx.DecodingError) as error:
            wrong = str(error)
        if wrong and self._silent_until is None:
            logger.warning("the Ray cluster at %s does not answer (%s); its jobs wait", self.address, wrong)
        self._silent_until = time.monotonic() + self.timing.pause if wrong else None
        return None if wrong else answer

    def rest(self) -> None:
        """Ask nothing for a while."""
        self._silent_until = time.monotonic() + self.timing.pause

    def details(self, answer: httpx.Response) -> Details:
        """Read a job's state from an answer. Raises LLMPruneError where it holds none."""
        try:
            return Details.model_validate(answer.json())
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            place = ".".join(map(str, wrong["loc"])) or "the answer"
            raise LLMPruneError(
                f"the Ray cluster at {self.address} sent no state of a job ({place}: {wrong['msg']}); "
                "check its version and --ray"
            ) from error

    def nodes(self) -> dict[str, Node] | None:
        """Return the nodes by id, dead ones included; None where the cluster does not list them."""
        answer = self.ask("GET", "/api/v0/nodes?limit=10000")
        try:
            listed = answer is not None and answer.is_success
            found = _NodeAnswer.model_validate_json(answer.content) if answer is not None and listed else None
        except ValidationError:
            return None
        return {node.node_id: node for node in found.data.result.result} if found else None


def _not_ray(answer: httpx.Response) -> str:
    """Return why an answer is not one of Ray's job API, with the remedy; empty where it may be one."""
    if answer.status_code in (401, 403):
        return "set RAY_AUTH_TOKEN to its token"
    if answer.is_redirect:
        return f"it redirects to {answer.headers.get('Location', 'another address')[:200]}; give that address as --ray"
    if answer.is_success:
        try:
            answer.json()
        except (ValueError, RecursionError):
            kind = answer.headers.get("Content-Type", "text of no kind")[:80]
            return f"it answers {kind} instead of JSON; give the address of Ray's dashboard as --ray"
    return ""


def last_line(text: str) -> str:
    """Return the last line of a traceback, which names the error."""
    return (text.strip().splitlines() or ["no reason was given"])[-1][:500]
