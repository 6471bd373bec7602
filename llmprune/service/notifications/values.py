"""Values of the notifications in the API, without FastAPI, so that the client reads them too."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from llmprune.service.notifications.targets import MAX_URL, MOST_TARGETS, Kind, Target

_Url = Annotated[str, StringConstraints(min_length=1, max_length=MAX_URL)]
_Email = Annotated[str, StringConstraints(min_length=1, max_length=254)]


class Delivery(BaseModel):
    """Delivery of a notification."""

    id: str = Field(description="Sent along as webhook-id, so that what comes twice can be dropped.")
    kind: Kind
    target: str = Field(description="Host of the webhook, or first letter and domain of the e-mail address.")
    state: str = Field(description="pending, delivered or given up.")
    tries: int = Field(description="Number of tries.")
    error: str | None = Field(description="Why the last try failed.")
    created: float = Field(description="Seconds since 1970, as are due and ended.")
    due: float = Field(description="When it is tried next, while it is pending.")
    ended: float | None


class Targets(BaseModel):
    """Places that are told when a job ends."""

    model_config = ConfigDict(extra="forbid")

    urls: list[_Url] = Field([], max_length=MOST_TARGETS, description="Webhooks: URLs that get a signed POST.")
    emails: list[_Email] = Field([], max_length=MOST_TARGETS, description="E-mail addresses.")

    @classmethod
    def of(cls, targets: tuple[Target, ...]) -> Targets:
        """Return targets as the API shows them."""
        found: dict[str, list[str]] = {"webhook": [], "email": []}
        for target in targets:
            found[target.kind].append(target.target)
        return cls(urls=found["webhook"], emails=found["email"])


_UNREADABLE = Field(
    0, description="Number of targets that cannot be read, because the service's key file was lost; save them again."
)


class JobNotifications(BaseModel):
    """Places that are told when a job ends, and what was sent to them."""

    targets: Targets
    unreadable: int = _UNREADABLE
    deliveries: list[Delivery] = Field(description="The newest first.")


class UserNotifications(BaseModel):
    """Notifications of the caller's new jobs."""

    targets: Targets = Field(description="For new jobs that name no targets.")
    unreadable: int = _UNREADABLE
    secret: str = Field(description="Signs the webhooks of the caller's jobs, as standardwebhooks.com describes.")
    tests: list[Delivery] = Field(description="Tests, the newest first.")
