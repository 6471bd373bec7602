"""Download the needed part of a hub model: the config alone, its small files, or the weights too.

All parts are of one commit, which is resolved once. Downloads continue where they stopped, and weights without the
SHA-256 that the hub states are downloaded again.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from llmprune.checkpoint.converted.pickles import pickles_in
from llmprune.checkpoint.copied_files import is_copied
from llmprune.checkpoint.weight_headers import Headers, headers_of_folder, headers_of_repository, weights_files
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.common.files import sha256_of
from llmprune.common.hub.client import resolve_revision, with_retries
from llmprune.common.hub.explanations import explain
from llmprune.common.hub.secrets import redact_error

logger = logging.getLogger(__name__)

Part = Literal["config", "tokenizer", "weights"]

_READ = ("*.json", "README.md")  # needed by loading and by the model card, even if they are not copied to the result


def commit_of(model_id: str, revision: str) -> str:
    """Return the commit of a hub model's revision. Raises ModelError."""
    try:
        return str(resolve_revision(model_id, revision).resolved)
    except Exception as error:  # the hub client's errors have no base in common
        raise _explained(model_id, revision, part="config", error=error) from error


def snapshot(model_id: str, revision: str, *, part: Part, with_code: bool = False, pickles: bool = False) -> Path:
    """Download a part of a hub model; return its folder in the hub client's cache.

    ``with_code``: Python files too; ``pickles``: pickled weights where there are no safetensors. Raises ModelError and
    CheckpointError.
    """
    commit = commit_of(model_id, revision)
    try:
        folder = _fetch(model_id, commit, patterns=["config.json", *(["*.py"] if with_code else [])])
        if part != "config":
            sizes = _sizes(model_id, commit)
            wanted = [
                name for name, size in sizes.items() if _is_read(name) or is_copied(name, size, trusted=with_code)
            ]
            folder = _fetch(model_id, commit, patterns=[glob.escape(name) for name in wanted])
        if part == "weights":
            names = weights_files(folder, sizes, shown=model_id)
            if pickles:
                names = names or pickles_in(folder, sizes, shown=model_id)
            _fetch_weights(model_id, commit, folder=folder, names=names)
        return folder
    except CheckpointError:
        raise
    except Exception as error:  # the hub client's errors have no base in common
        raise _explained(model_id, revision, part=part, error=error) from error


def fetch(model_id: str, revision: str, *, names: list[str]) -> Path:
    """Download files of a hub model, and check large ones; return its folder in the hub client's cache.

    Raises ModelError and CheckpointError.
    """
    commit = commit_of(model_id, revision)
    try:
        folder = _fetch(model_id, commit, patterns=["config.json"])
        _fetch_weights(model_id, commit, folder=folder, names=names)
        return folder
    except CheckpointError:
        raise
    except Exception as error:  # the hub client's errors have no base in common
        raise _explained(model_id, revision, part="weights", error=error) from error


def file_sizes(model_id: str, revision: str) -> dict[str, int]:
    """Return the size in bytes of every file of a hub model."""
    return _sizes(model_id, commit_of(model_id, revision))


def headers(model_id: str, revision: str) -> Headers | None:
    """Return the headers of a hub model's weights files, from the cache or the hub.

    None where the hub may not be asked (HF_HUB_OFFLINE). Raises ModelError and CheckpointError.
    """
    from huggingface_hub import constants

    commit = commit_of(model_id, revision)
    try:
        names = list(_sizes(model_id, commit))
        folder = _fetch(model_id, commit, patterns=["config.json", *[name for name in names if _is_index(name)]])
        files = weights_files(folder, names, shown=model_id)
        if all((folder / name).is_file() for name in files):
            return headers_of_folder(folder, model_id)
        return None if constants.HF_HUB_OFFLINE else headers_of_repository(model_id, commit, files=tuple(files))
    except CheckpointError:
        raise
    except Exception as error:  # the hub client's errors have no base in common
        raise _explained(model_id, revision, part="weights", error=error) from error


def names_of(model_id: str, revision: str) -> list[str]:
    """Return the names of all files of a hub model, of which ``snapshot`` has downloaded a part."""
    return list(file_sizes(model_id, revision))


def _is_index(name: str) -> bool:
    return name.endswith(".safetensors.index.json") and "/" not in name


def _explained(model_id: str, revision: str, *, part: Part, error: Exception) -> ModelError:
    redact_error(error)
    return ModelError(
        f"there is no folder {model_id!r}, and as a hub model (revision {revision}) its {part} cannot be fetched: "
        f"{explain(error)}"
    )


def _fetch(model_id: str, commit: str, *, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(with_retries(lambda: snapshot_download(model_id, revision=commit, allow_patterns=patterns)))


def _sizes(model_id: str, commit: str) -> dict[str, int]:
    """Return the sizes of the commit's files, as the first download recorded them; else those of the cached files."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(model_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        folder = Path(snapshot_download(model_id, revision=commit, local_files_only=True))
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _is_read(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _READ)


def _fetch_weights(model_id: str, commit: str, *, folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    for again in (True, False):
        _fetch(model_id, commit, patterns=[glob.escape(name) for name in missing])
        missing = [name for name in missing if not _has_its_hash(folder / name)]
        if not missing:
            return
        for name in missing:
            path = folder / name
            for copy in (path.resolve(), _blob(path), path):
                copy.unlink(missing_ok=True)
        if again:
            logger.warning("%s of %s arrived damaged and is downloaded again", ", ".join(missing), model_id)
    raise CheckpointError(
        f"{', '.join(missing)} of {model_id} does not have the SHA-256 that the hub states, in two downloads; "
        "the file is damaged there or in transit: try again later, or ask its owner"
    )


def _has_its_hash(path: Path) -> bool:
    """Check that a downloaded file has the hub's SHA-256, which is its name in the hub client's cache."""
    blob = _blob(path)
    if not blob.is_file() or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.is_file()
    return sha256_of(blob) == blob.name


def _blob(path: Path) -> Path:
    """Return a snapshot's file in its repository's cache, which may be a link to a store that repositories share."""
    return path.parent / os.readlink(path) if path.is_symlink() else path
