"""Access of a request to the hub: the user of its token, and the repositories that this user may see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request

from helpers.hub.state import KINDS, SIGNATURE, Repo, User

if TYPE_CHECKING:
    from helpers.hub.server import Hub


class Refused(Exception):
    """Error with which the hub answers a request."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Routes:
    """Routes of one hub. Subclasses add handlers."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def user(self, request: Request) -> User | None:
        """Return the user of the request's token; None without a token. Raises Refused."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(given)

    def find(self, request: Request, kind: str, namespace: str, name: str, write: bool = False) -> Repo:
        """Return a repository that the user may see, or write to. Raises Refused."""
        asking = self.user(request)
        repo = self.hub.repos.get((KINDS.get(kind, kind), f"{namespace}/{name}"))
        if repo is None or (repo.private and not (asking and (asking.name == namespace or namespace in asking.orgs))):
            raise Refused(404 if asking else 401, "RepoNotFound", "Repository not found")
        if write and not (asking and asking.may_write(namespace)):
            raise Refused(403, message="You don't have the rights to do this")
        return repo


def commit_of(repo: Repo, revision: str) -> str:
    """Return the SHA of a revision. Raises Refused where there is none."""
    sha = repo.resolve(revision)
    if sha is None:
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return sha


def require_signed(request: Request) -> None:
    """Refuse a request to the storage without a signature in its address, or with a token."""
    if SIGNATURE not in str(request.url) or "authorization" in request.headers:
        raise Refused(400, message="signed addresses alone, and no token")


def unquoted(revision: str) -> str:
    """Return a revision with its slashes."""
    return revision.replace("%2F", "/")
