"""Everything in one commit, or not at all.

Large files go first and belong to no commit until the last request makes one; when that
is refused, nothing of the repository has changed. Run again, what has arrived is not sent again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import HubError
from llmprune.common.hub.client import with_retries
from llmprune.common.hub.errors import status_of
from llmprune.common.hub.explanations import explain
from llmprune.common.hub.secrets import redact, redact_error
from llmprune.publish.preflight import Target, look, require_hidden
from llmprune.publish.provenance import FILE
from llmprune.publish.published import Published
from llmprune.recipe.hub import Hub

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

logger = logging.getLogger(__name__)

# An older push may have left weights under other names, which a loader would prefer or mix in.
_REPLACED = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_*", "plots/*.png")


def additions(files: Mapping[str, Path]) -> list[CommitOperationAdd]:
    """One operation for each file by its path in the repository."""
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())]


def upload(hub: Hub, operations: list[CommitOperationAdd], *, message: str) -> Published:
    """Make the repository if need be, send the files, and commit them. Raises HubError.

    ``operations`` hold every file of the result; what an earlier push left beside them goes in the same commit.
    """
    target = look(hub, reached=True)
    try:
        return _upload(hub, target, operations=operations, message=message)
    except HubError:
        raise
    except Exception as error:  # the hub client's errors have no base in common
        redact_error(error)
        made = "" if target.exists else "; the repository itself may be there by now, and empty"
        raise HubError(f"nothing was published to {hub.repo_id}: {_why(error)}{made}") from error


def _why(error: Exception) -> str:
    if status_of(error) == 412:
        return (
            "somebody else committed to it during the upload; look at that commit, "
            "then run the same command again: what was sent is not sent again"
        )
    return explain(error)


def _upload(hub: Hub, target: Target, *, operations: list[CommitOperationAdd], message: str) -> Published:
    from huggingface_hub import CommitOperationDelete, HfApi

    api, repo_id, branch = HfApi(), hub.repo_id, hub.branch or "main"
    if not target.exists:
        with_retries(lambda: api.create_repo(repo_id, private=hub.private, exist_ok=True))
        made = with_retries(lambda: api.repo_info(repo_id))
        require_hidden(hub, made.private)  # another may have made it in the meantime
    if branch != "main":
        with_retries(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    parent = str(with_retries(lambda: api.repo_info(repo_id, revision=branch)).sha)
    there = with_retries(lambda: api.list_repo_files(repo_id, revision=parent))
    sent = {operation.path_in_repo for operation in operations}
    stale = [name for name in there if name not in sent and _is_replaced(name)]
    logger.info("sending %d files to %s (%s)", len(operations), repo_id, branch)
    with_retries(
        lambda: api.preupload_lfs_files(
            repo_id, operations, revision=branch, create_pr=hub.create_pr, free_memory=False
        )
    )
    everything = [*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)]
    commit = _commit(hub, branch, parent=parent, operations=everything, message=message)
    _require_arrived(repo_id, commit.oid, operations=operations)
    return Published(
        repo_id=repo_id,
        commit=commit.oid,
        url=redact(commit.pr_url or commit.commit_url),
        pull_request=commit.pr_url and redact(commit.pr_url),
        files=len(operations),
        bytes=sum(operation.upload_info.size for operation in operations),
    )


def _is_replaced(name: str) -> bool:
    """Whether an older push left it: weights in the root, or a chart; other folders are other people's."""
    path = PurePosixPath(name)
    return path.parent.as_posix() in (".", "plots") and any(fnmatch(name, kind) for kind in _REPLACED)


def _commit(hub: Hub, branch: str, *, parent: str, operations: list[Any], message: str) -> CommitInfo:
    """The commit on top of ``parent``; one whose answer was lost is found again rather than made twice."""
    from huggingface_hub import HfApi

    tried = False

    def commit() -> CommitInfo:
        nonlocal tried
        landed = _landed(hub, branch, parent=parent, operations=operations, message=message) if tried else None
        tried = True
        return landed or HfApi().create_commit(
            hub.repo_id,
            operations,
            commit_message=message,
            revision=None if hub.create_pr else branch,
            parent_commit=parent,
            create_pr=hub.create_pr,
        )

    return with_retries(commit)


def _landed(hub: Hub, branch: str, *, parent: str, operations: list[Any], message: str) -> CommitInfo | None:
    """What an attempt without an answer did after all: a new head with this very provenance file."""
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.utils.sha import git_hash

    api = HfApi()
    (own,) = (operation for operation in operations if operation.path_in_repo == FILE)
    with own.as_file() as file:
        blob = git_hash(file.read())
    heads: dict[str, str | None] = {branch: None}
    if hub.create_pr:
        opened = api.get_repo_discussions(hub.repo_id, discussion_type="pull_request", discussion_status="open")
        heads = {found.git_reference: found.url for found in opened if found.title == message}
    for revision, pull_request in heads.items():
        head = api.repo_info(hub.repo_id, revision=revision).sha
        files = api.get_paths_info(hub.repo_id, [FILE], revision=head) if head != parent else []
        if any(found.blob_id == blob for found in files):
            url = f"{api.endpoint}/{hub.repo_id}/commit/{head}"
            return CommitInfo(
                commit_url=url, commit_message=message, commit_description="", oid=head, pr_url=pull_request
            )
    return None


def _require_arrived(repo_id: str, commit: str, *, operations: list[CommitOperationAdd]) -> None:
    """Raise HubError where the hub names another SHA-256 or size for a file than was sent."""
    from huggingface_hub import HfApi

    names = [operation.path_in_repo for operation in operations]
    there = {file.path: file for file in with_retries(lambda: HfApi().get_paths_info(repo_id, names, revision=commit))}
    wrong = []
    for operation in operations:
        file, sent = there.get(operation.path_in_repo), operation.upload_info
        same = file is not None and file.size == sent.size and (not file.lfs or file.lfs.sha256 == sent.sha256.hex())
        if not same:
            wrong.append(operation.path_in_repo)
    if wrong:
        raise HubError(
            f"the commit {commit} of {repo_id} does not hold what was sent ({', '.join(wrong[:3])}); "
            "delete it there, and run the same command again"
        )
