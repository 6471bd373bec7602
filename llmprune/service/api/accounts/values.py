"""Values of accounts, users and the audit log in the answers of the API. The Python client reads them: no FastAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmprune.service.users.quotas import OwnQuotas, Quotas, Usage
from llmprune.service.users.tokens import SCOPES, Scope
from llmprune.service.users.users import NAME, Role


class Account(BaseModel):
    """The caller, with usage and quotas."""

    name: str
    role: Role = Field(description="Role of the user, or a lower one where the token allows no more.")
    scopes: list[Scope] = Field(description="Kinds of requests that role and token allow.")
    usage: Usage = Field(description="Share of each quota that is used.")
    quotas: Quotas = Field(description="Limits; null: no limit.")


class NewToken(BaseModel):
    """A token to make."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64, description="Letters, digits, spaces and .@_-; unique for its user.")
    scopes: list[Scope] = Field(
        default_factory=lambda: list(SCOPES),
        min_length=1,
        max_length=len(SCOPES),
        description="What it may do, within its user's role. Default: everything.",
    )
    days: float | None = Field(None, gt=0, le=3660, description="Days until it expires; null: never.")


class MadeToken(BaseModel):
    """A token, which is shown this once."""

    token: str


class ShownToken(BaseModel):
    """A token as lists show it."""

    id: str
    name: str
    scopes: list[Scope]
    created: float = Field(description="Seconds since 1970, as are expires and used.")
    expires: float | None
    used: float | None = Field(description="The last request, to within minutes; null: never used.")


class ShownSession(BaseModel):
    """A browser session."""

    id: str
    browser: str = Field(description="What the browser calls itself.")
    token: str | None = Field(description="Name of the token that opened it; null: the OpenID provider.")
    created: float = Field(description="Seconds since 1970, as is expires.")
    expires: float


class ShownUser(BaseModel):
    """A user of the service."""

    name: str
    role: Role
    email: str | None = Field(description="Whoever proves it at the OpenID provider signs in as this user.")
    disabled: bool = Field(description="Tokens are refused; jobs are kept, and waiting ones do not start.")
    created: float = Field(description="Seconds since 1970, as is seen.")
    seen: float | None = Field(description="The last request, to within minutes.")


class UserDetails(ShownUser):
    """A user with usage and quotas."""

    usage: Usage
    quotas: Quotas = Field(description="Limits that hold; null: no limit.")
    own_quotas: OwnQuotas = Field(
        description="Limits that an admin gave; null: no limit. Those that are not listed are the service's."
    )


class NewUser(BaseModel):
    """A user to make, who has no token yet."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=f"^{NAME}$")
    role: Role = "user"
    email: str | None = Field(None, max_length=250, description="Address at the OpenID provider.")


class UserChanges(BaseModel):
    """Changes of a user; what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = None
    email: str | None = Field(None, max_length=250, description="Empty: none.")
    disabled: bool | None = None


class Receiver(BaseModel):
    """The user who gets the jobs."""

    model_config = ConfigDict(extra="forbid")

    to: str = Field(pattern=f"^{NAME}$")


class Moved(BaseModel):
    """Result of a transfer, or of the deletion of a user."""

    jobs: int = Field(description="Jobs that have a new owner.")


class AuditEntry(BaseModel):
    """An attempt to change something."""

    time: str = Field(description="UTC, such as 2026-01-31T14:05:00Z.")
    caller: str | None = Field(None, description="Who tried it; null: nobody who is known.")
    address: str | None = Field(None, description="Address of the client; null: a command on the service's machine.")
    action: str = Field("", description="Method and route, or the command.")
    job: str | None = None
    user: str | None = Field(None, description="The user whose account was to be changed.")
    status: int | None = Field(None, description="Status of the answer; null: a command, which was done.")
    details: dict[str, Any] | None = Field(None, description="Values that the change set.")


class AuditEntries(BaseModel):
    """A page of the audit log, the newest entry first."""

    entries: list[AuditEntry]
    next: str | None = Field(description="Value of before for the next page; null: this is the last page.")
    read_all: bool = Field(description="False: the page ended because a part of the log was searched; go on with next.")
