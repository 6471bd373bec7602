"""Calls of the API: one request, and the type of its answer. The clients send them, this module only describes them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypedDict, TypeVar, get_args

from llmprune.common.errors import RecipeError, did_you_mean
from llmprune.service.jobs.job import JOB_ID, State
from llmprune.service.jobs.library.models import Order, Sort, Stage
from llmprune.service.jobs.sweeps.axes import split_values
from llmprune.service.users.users import NAME

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
PLAN_TIMEOUT = 300.0  # seconds; a plan waits for the plans of others
HASH_TIMEOUT = 3600.0  # seconds; the service reads the whole model


@dataclass(frozen=True)
class Call(Generic[R_co]):
    """A request to the API. ``shape``: type of its answer's JSON; ``timeout``: seconds, None: that of the client.

    Every call is safe to repeat, and is repeated where the connection breaks.
    """

    method: str
    path: str
    shape: type[R_co]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: str | bytes | None = None
    json: Any = None
    timeout: float | None = None

    def options(self) -> dict[str, Any]:
        """Return the request's options as httpx takes them."""
        given = {"content": self.content, "json": self.json, "timeout": self.timeout}
        sent = {name: value for name, value in given.items() if value is not None}
        return sent | {"params": without_nothing(self.params), "headers": dict(self.headers)}


class SweepSettings(TypedDict, total=False):
    """Settings of every job of a sweep, and the sweep's name; the service chooses those that are left out."""

    name: str | None
    launcher: str | None
    gpus: int | None
    priority: int | None
    time_limit: float | None  # seconds
    shared: bool | None


class JobSettings(SweepSettings, total=False):
    """Settings of a submission, and the targets of its notifications."""

    notify_urls: Iterable[str] | None
    notify_emails: Iterable[str] | None


class JobFilters(TypedDict, total=False):
    """Selection of jobs. ``search``: part of the name or model, or an id; ``source``: pushes of this job's model.

    ``made_from``: follow-ups of this job.
    """

    state: str | Iterable[str] | None
    owner: str | None
    search: str | None
    source: str | None
    made_from: str | None


class ModelFilters(TypedDict, total=False):
    """Selection of models and their order. ``search``: words of the name, the base, a tag or the notes.

    ``base``: only models pruned from this one.
    """

    search: str | None
    stage: Stage | None
    tag: str | None
    base: str | None
    owner: str | None
    sort: Sort
    order: Order


class LabelChanges(TypedDict, total=False):
    """Change of a model's labels; what is left out stays. ``tags`` and ``notes`` replace earlier ones."""

    stage: Stage | None
    tags: Sequence[str] | None
    add_tags: Sequence[str] | None
    remove_tags: Sequence[str] | None
    notes: str | None


class UploadSettings(TypedDict, total=False):
    """Name and labels of an uploaded model."""

    name: str | None
    shared: bool | None
    tags: Sequence[str] | None
    notes: str | None


class AuditFilters(TypedDict, total=False):
    """Selection of entries of the audit log. ``action``: a part of it; ``since``, ``until``: UTC, as 2026-01-31T14:05.

    ``user``: what this user did, or what was done to this user.
    """

    user: str | None
    action: str | None
    job: str | None
    since: str | None
    until: str | None


class QuotaLimits(TypedDict, total=False):
    """Limits of one user in place of the service's. None: no limit."""

    queued: int | None
    running: int | None
    gpus: int | None
    disk: int | None  # bytes
    per_day: int | None
    kept: int | None


def params_of(given: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return keyword arguments as parameters of a request; the service would ignore unknown ones. Raises TypeError."""
    known = list(kind.__annotations__)
    for name in given:
        if name not in known:
            raise TypeError(f"{name!r} is no argument here; there are {', '.join(known)}{did_you_mean(name, known)}")
    return dict(given) | ({"state": states_of(given["state"])} if "state" in given else {})


def without_nothing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def recipe_call(
    path: str,
    shape: type[R],
    *,
    recipe: tuple[str, Sequence[str]],
    params: Mapping[str, Any] = MappingProxyType({}),
    **rest: Any,
) -> Call[R]:
    """Return a call that sends a recipe. ``recipe``: its text and its overrides; ``rest``: other fields of the call."""
    text, overrides = recipe
    headers = {"Content-Type": "application/yaml"} | rest.pop("headers", {})
    return Call("POST", path, shape, {**params, "set": list(overrides)}, headers, text, **rest)


def job_path(job: str) -> str:
    """Return the path of a job. Raises RecipeError where no job can have this id."""
    return f"/v1/jobs/{checked_id(job)}"


def checked_id(id: str, *, kind: str = "job", listed_by: str = "llmprune jobs lists them") -> str:
    """Return the id of a job, a model, a sweep or an upload. Raises RecipeError where there can be none of this id."""
    if not re.fullmatch(JOB_ID, id):
        raise RecipeError(f"there is no {kind} {id!r}: an id is 12 of the digits 0-9 and letters a-f; {listed_by}")
    return id


def checked_name(name: str) -> str:
    """Return the name of a user. Raises RecipeError where no user can have it."""
    if not re.fullmatch(NAME, name):
        raise RecipeError(f"there is no user {name!r}: a name has at most 64 letters, digits and .@_-")
    return name


def states_of(state: str | Iterable[str] | None) -> list[str]:
    """Return the states of a filter. Raises RecipeError for one that does not exist."""
    states = [state] if isinstance(state, str) else list(state or ())
    for one in states:
        if one not in get_args(State):
            near = did_you_mean(one, get_args(State))
            raise RecipeError(f"--state {one!r}: there is no such state; choose {', '.join(get_args(State))}{near}")
    return states


def new_token(name: str, scopes: Sequence[str] | None, *, days: float | None) -> dict[str, Any]:
    """Return the body that asks for a token."""
    return without_nothing({"name": name, "scopes": None if scopes is None else list(scopes), "days": days})


def values_of(vary: Mapping[str, Sequence[object]] | Sequence[str]) -> list[str]:
    """Return the axes of a sweep as texts such as ``budget.parameters=0.9,0.8``. Raises RecipeError."""
    if not isinstance(vary, Mapping):
        return [vary] if isinstance(vary, str) else list(vary)
    return [f"{key}={','.join(map(_value_text, values))}" for key, values in vary.items()]


def _value_text(value: object) -> str:
    """Return a value as the text of an override."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(split_values(text)) == 1 else json.dumps(text)


def new_key(key: str | None = None) -> dict[str, str]:
    """Return the header that makes a submission safe to repeat, by default with a new key."""
    return {"Idempotency-Key": key or uuid.uuid4().hex}


def notify_headers(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers with the targets of a job's notifications. Raises RecipeError for one that has spaces."""
    found: dict[str, str] = {}
    for name, header in (("notify_urls", "X-Notify-URL"), ("notify_emails", "X-Notify-Email")):
        targets = list(settings.get(name) or ())
        for target in targets:
            if not re.fullmatch(r"[!-~]+", target):
                raise RecipeError(f"{target[:100]!r}: a URL or an e-mail address has no spaces and only ASCII letters")
        found |= {header: " ".join(targets)} if targets else {}
    return found


def hub_header(token: str | None) -> dict[str, str]:
    """Return the header with a hub token."""
    require_plain(token or "", "the hub token")
    return {"X-Hub-Token": token} if token else {}


def require_plain(token: str, what: str) -> None:
    """Raise RecipeError for a token that a header cannot hold."""
    if not re.fullmatch(r"[!-~]*", token):
        raise RecipeError(f"{what} has spaces, line breaks or letters that no token has; copy it again")
