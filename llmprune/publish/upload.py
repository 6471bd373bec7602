"""Upload of a result in one commit, or not at all.

Large files are uploaded first, without a commit. The last request creates the commit; if it is refused, the repository
has not changed. A second attempt does not send uploaded files again.
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
from llmprune.publish.generated_windows import GENERATED, GENERATED_FOR_RECOVERY
from llmprune.publish.preflight import RepoState, check_push, require_private
from llmprune.publish.provenance import FILE
from llmprune.publish.published import Published
from llmprune.recipe.hub import Hub

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

logger = logging.getLogger(__name__)

# Of an earlier push: a loader would prefer its weights under other names or mix them in.
_REPLACED = (
    *("model*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_*", "plots/*.png"),
    *(GENERATED, GENERATED_FOR_RECOVERY),
)


def additions(files: Mapping[str, Path]) -> list[CommitOperationAdd]:
    """Return an operation for each file, by its path in the repository."""
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())]


def upload(hub: Hub, operations: list[CommitOperationAdd], *, message: str) -> Published:
    """Create the repository if it is missing, send the files, and commit them. Raises HubError.

    ``operations`` add every file of the result. The same commit deletes outdated files of an earlier push.
    """
    state = check_push(hub, reached=True)
    try:
        return _upload(hub, state, operations=operations, message=message)
    except HubError:
        raise
    except Exception as error:  # the hub client's errors have no base in common
        redact_error(error)
        created = "" if state.exists else "; the repository itself may have been created, without files"
        raise HubError(f"nothing was published to {hub.repo_id}: {_cause(error)}{created}") from error


def _cause(error: Exception) -> str:
    if status_of(error) == 412:
        return (
            "another commit was made during the upload; check that commit, "
            "then run the same command again: uploaded files are not sent again"
        )
    return explain(error)


def _upload(hub: Hub, state: RepoState, *, operations: list[CommitOperationAdd], message: str) -> Published:
    from huggingface_hub import CommitOperationDelete, HfApi

    api, repo_id, branch = HfApi(), hub.repo_id, hub.branch or "main"
    if not state.exists:
        with_retries(lambda: api.create_repo(repo_id, private=hub.private, exist_ok=True))
        created = with_retries(lambda: api.repo_info(repo_id))
        require_private(hub, created.private)  # another process may have created it in the meantime
    if branch != "main":
        with_retries(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    parent = str(with_retries(lambda: api.repo_info(repo_id, revision=branch)).sha)
    present = with_retries(lambda: api.list_repo_files(repo_id, revision=parent))
    sent = {operation.path_in_repo for operation in operations}
    stale = [name for name in present if name not in sent and _is_replaced(name)]
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
    """Check that a file is of an earlier push: weights or generated windows in the root folder, or a chart."""
    path = PurePosixPath(name)
    return path.parent.as_posix() in (".", "plots") and any(fnmatch(name, kind) for kind in _REPLACED)


def _commit(hub: Hub, branch: str, *, parent: str, operations: list[Any], message: str) -> CommitInfo:
    """Commit on top of ``parent``; a commit whose response was lost is found again rather than repeated."""
    from huggingface_hub import HfApi

    tried = False

    def commit() -> CommitInfo:
        nonlocal tried
        found = _find_commit(hub, branch, parent=parent, operations=operations, message=message) if tried else None
        tried = True
        return found or HfApi().create_commit(
            hub.repo_id,
            operations,
            commit_message=message,
            revision=None if hub.create_pr else branch,
            parent_commit=parent,
            create_pr=hub.create_pr,
        )

    return with_retries(commit)


def _find_commit(hub: Hub, branch: str, *, parent: str, operations: list[Any], message: str) -> CommitInfo | None:
    """Return the commit of an attempt without a response: a new head with the same provenance file."""
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.utils.sha import git_hash

    api = HfApi()
    (own,) = (operation for operation in operations if operation.path_in_repo == FILE)
    with own.as_file() as file:
        blob = git_hash(file.read())
    heads: dict[str, str | None] = {branch: None}
    if hub.create_pr:
        opened = api.get_repo_discussions(hub.repo_id, discussion_type="pull_request", discussion_status="open")
        heads = {pull.git_reference: pull.url for pull in opened if pull.title == message}
    for revision, pull_request in heads.items():
        head = api.repo_info(hub.repo_id, revision=revision).sha
        files = api.get_paths_info(hub.repo_id, [FILE], revision=head) if head != parent else []
        if any(file.blob_id == blob for file in files):
            url = f"{api.endpoint}/{hub.repo_id}/commit/{head}"
            return CommitInfo(
                commit_url=url, commit_message=message, commit_description="", oid=head, pr_url=pull_request
            )
    return None


def _require_arrived(repo_id: str, commit: str, *, operations: list[CommitOperationAdd]) -> None:
    """Raise HubError if the hub reports another SHA-256 or size of a file than was sent."""
    from huggingface_hub import HfApi

    names = [operation.path_in_repo for operation in operations]
    present = {
        file.path: file for file in with_retries(lambda: HfApi().get_paths_info(repo_id, names, revision=commit))
    }
    wrong = []
    for operation in operations:
        file, sent = present.get(operation.path_in_repo), operation.upload_info
        same = file is not None and file.size == sent.size and (not file.lfs or file.lfs.sha256 == sent.sha256.hex())
        if not same:
            wrong.append(operation.path_in_repo)
    if wrong:
        raise HubError(
            f"the commit {commit} of {repo_id} does not hold the files that were sent ({', '.join(wrong[:3])}); "
            "delete the commit on the hub, and run the same command again"
        )
