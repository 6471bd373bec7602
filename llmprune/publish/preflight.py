"""Checks before a run that its result can be pushed: token, permissions, repository name, visibility."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from llmprune.common.errors import HubError
from llmprune.common.hub.client import with_retries
from llmprune.common.hub.errors import status_of
from llmprune.common.hub.explanations import endpoint, explain
from llmprune.common.hub.secrets import redact_error
from llmprune.recipe.hub import Hub

logger = logging.getLogger(__name__)

_READ_ONLY_ROLES = ("read", "no_access")  # of a user in an organisation


@dataclass(frozen=True)
class RepoState:
    """Current state of the repository on the hub."""

    exists: bool
    private: bool | None  # None if it does not exist
    user: str


def check_push(hub: Hub, reached: bool = False) -> RepoState:
    """Return the repository's state. Raises HubError if the push is not possible or not allowed.

    ``reached``: the hub was reached before, so a refused connection is taken for temporary and tried again.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    api, repo_id = HfApi(), hub.repo_id
    if constants.is_offline_mode():
        raise HubError(f"{repo_id} cannot be pushed to: HF_HUB_OFFLINE is set; unset it, or leave out the hub section")
    try:
        user = with_retries(api.whoami, reached)
        try:
            info = with_retries(lambda: api.repo_info(repo_id))
        except RepositoryNotFoundError:
            info = None
        if info is not None:
            _require_write(repo_id)
    except HubError:
        raise
    except Exception as error:  # the hub client's errors have no base in common
        redact_error(error)
        raise HubError(f"{repo_id} cannot be pushed to: {explain(error)}") from error
    _require_rights(hub, user, exists=info is not None)
    if info is not None:
        require_private(hub, info.private)
    if info is not None and info.private and not hub.private:
        logger.warning("%s is private and remains private: change the visibility on its page on the hub", repo_id)
    return RepoState(info is not None, info.private if info is not None else None, str(user.get("name", "")))


def require_private(hub: Hub, private: bool) -> None:
    """Raise HubError if the repository is public and the settings ask for a private one."""
    if hub.private and not private:
        raise HubError(
            f"{hub.repo_id} is public on {endpoint()} and hub.private is true; set hub.private: false (--public) to "
            "publish there, or name another repository"
        )


def _require_write(repo_id: str) -> None:
    """Raise if the hub denies write access; hubs without this endpoint answer 404 and are not asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with_retries(lambda: HfApi().auth_check(repo_id, write=True))
    except HfHubHTTPError as error:
        if status_of(error) != 404:
            raise


def _require_rights(hub: Hub, user: dict[str, Any], *, exists: bool) -> None:
    namespace = hub.repo_id.split("/")[0]
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"{hub.repo_id} cannot be pushed to: HF_TOKEN is a read-only token of {user.get('name')}; "
            "create one with write access on the hub's settings page"
        )
    if exists:
        return
    if hub.create_pr:
        raise HubError(f"{hub.repo_id} does not exist, so no pull request can be opened; leave out create_pr")
    organisations = [org for org in user.get("orgs") or () if org.get("roleInOrg") not in _READ_ONLY_ROLES]
    owners = [str(owner.get("name")) for owner in (user, *organisations)]
    if namespace not in owners:
        raise HubError(
            f"{hub.repo_id} cannot be created: {user.get('name')} may not write to {namespace!r}, "
            f"only to {', '.join(owners)}; correct hub.repo_id, or use another token"
        )
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None and not _grants(scopes, namespace):
        raise HubError(
            f"{hub.repo_id} cannot be created: the fine-grained token cannot write to repositories of {namespace}; "
            "add it on the hub's settings page"
        )


def _grants(scopes: list[dict[str, Any]], namespace: str) -> bool:
    return any(
        (scope.get("entity") or {}).get("name") == namespace and "repo.write" in (scope.get("permissions") or ())
        for scope in scopes
    )
