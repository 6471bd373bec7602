"""Tell a path of this machine from a hub id, and explain a path that leads to no folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from llmprune.common.errors import ModelError

_KINDS = {  # by the suffix of a file's name
    ".gguf": "GGUF file",
    ".safetensors": "weights file",
    ".json": "file",
    ".yaml": "recipe",
    ".yml": "recipe",
}


def local_folder(place: str, *, wanted: str) -> Path | None:
    """Return the folder at a path of this machine; None for a hub id.

    ``wanted``: the places that could be given instead. Raises ModelError for a file, and for a path without a folder.
    """
    path = Path(place).expanduser()
    kind = _KINDS.get(path.suffix)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{place} is a {kind or 'file'}; give {wanted}")
    if is_path(place):
        raise ModelError(f"the {kind or 'folder'} {place} does not exist; give {wanted}")
    return None


def is_path(place: str) -> bool:
    """Check that a place is a path by its form: no hub id has it.

    ``models/base.gguf`` may be either: it is a path where there is a folder ``models``.
    """
    if place.startswith(("/", ".", "~")) or place.count("/") > 1:
        return True
    path = PurePosixPath(place)
    return path.suffix in _KINDS and ("/" not in place or Path(path.parent).is_dir())
