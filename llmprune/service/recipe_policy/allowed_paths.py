"""Files and folders that a recipe from the network may name.

Models and text: files and folders under ``--allow-root``, links resolved. Task files: the folders of ``--allow-tasks``.
The model alone may also be that of a finished job which the client may read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from llmprune.recipe.text_source import FILE_BUILDERS, PACKAGE_SCHEME, PACKAGES
from llmprune.service.recipe_policy.free_text import FreeText, NotAllowedError
from llmprune.service.settings import Settings

# The datasets library takes these ids for loaders of local files instead of repositories.
BUILDERS = frozenset({
    "arrow", "audiofolder", "cache", "conll", "csv", "eval", "fasta", "fastq", "folder", "folder_based_builder",
    "genbank", "generator", "harbor", "hdf5", "iceberg", "imagefolder", "json", "lance", "meshfolder", "mmcif",
    "niftifolder", "pandas", "parquet", "pdb", "pdffolder", "spark", "sql", "text", "tsfile", "videofolder", "vortex",
    "webdataset", "xml",
})  # fmt: skip
JOB_SCHEME = "job://"  # job://ID: the finished model of a job
ModelOf = Callable[[str], Path | None]  # the model's folder of a job, by its id; None where the client may read none
_NAME = r"[A-Za-z0-9](?:[\w-]|\.(?!\.)){0,95}"
_HUB_ID = re.compile(rf"{_NAME}(?:/{_NAME})?", re.ASCII)


def hub_id_or_path(text: FreeText, settings: Settings) -> Path | None:
    """Allow a hub id, one of PACKAGES, or a path under ``--allow-root``: a model's folder, a file of GGUF or text."""
    value, roots, is_data = text.value, settings.allow_roots, text.key.endswith("dataset")
    if value in PACKAGES:
        return None
    if "://" in value or value.startswith(PACKAGE_SCHEME.rstrip("/")):
        raise NotAllowedError("no URLs: give a hub id such as org/name")
    if (
        _looks_like_path(value)
        or (is_data and Path(value).suffix in FILE_BUILDERS)
        or any(_inside(value, root) is not None for root in roots)
    ):
        remedy = f"give a hub id{_or_under(roots, 'a file' if is_data else 'a folder')}"
        return _allowed_path(value, settings, is_file=is_data or Path(value).suffix == ".gguf", remedy=remedy)
    if not _HUB_ID.fullmatch(value) or (is_data and value in BUILDERS):
        raise NotAllowedError("give a hub id such as org/name")
    return None


def model_of_job(text: FreeText, model_of: ModelOf) -> Path:
    """Allow the model of a finished job that the client may read."""
    found = model_of(text.value.removeprefix(JOB_SCHEME))
    if found is None:
        raise NotAllowedError("there is no job of this id with a finished model; give job://ID of one that has")
    return found


def tokens_file(text: FreeText, settings: Settings) -> Path:
    """Allow a file of tokens under ``--allow-root``."""
    remedy = f"name calibration text instead{_or_under(settings.allow_roots, 'a file')}"
    return _allowed_path(text.value, settings, is_file=True, remedy=remedy)


def speed_table(text: FreeText, settings: Settings) -> Path:
    """Allow a file with a table of times under ``--allow-root``."""
    remedy = f"leave it out, and the machine of the job is measured{_or_under(settings.allow_roots, 'a file')}"
    return _allowed_path(text.value, settings, is_file=True, remedy=remedy)


def task_folder(text: FreeText, settings: Settings) -> Path:
    """Allow the folders of ``--allow-tasks`` themselves, by name or by path, for task files run code."""
    trusted = task_folders(settings)
    asked = trusted.get(text.value) or (Path(text.value).resolve() if "\0" not in text.value else None)
    if asked is None or asked not in trusted.values():
        raise NotAllowedError("task files run code, so only the service's operator can name a folder of them")
    return asked


def task_folders(settings: Settings) -> dict[str, Path]:
    """Return the folders of ``--allow-tasks`` by the names that recipes may use.

    The name is that of the folder, or ``tasks-N`` for all of them where two folders have the same name.
    """
    folders = {folder.name: folder.resolve() for folder in settings.allow_tasks}
    clash = len(folders) < len(settings.allow_tasks)
    return {f"tasks-{n}": folder.resolve() for n, folder in enumerate(settings.allow_tasks)} if clash else folders


def _allowed_path(value: str, settings: Settings, *, is_file: bool, remedy: str) -> Path:
    """Return an existing file, or else folder, under one of the roots once links are resolved."""
    found = [inside for root in settings.allow_roots if (inside := _inside(value, root)) is not None]
    if found and found[0].is_relative_to(settings.data_dir.resolve()):
        raise NotAllowedError("the service's own folder holds other people's jobs")
    if not found or found[0].is_file() != is_file:
        raise NotAllowedError(remedy)
    return found[0]


def _inside(value: str, root: Path) -> Path | None:
    """Return the resolved path where it exists under the root."""
    if "\0" in value or value.startswith("~"):
        return None
    place, root = (root / value).resolve(), root.resolve()
    return place if place.is_relative_to(root) and os.path.exists(place) else None  # False for a name that is too long


def _looks_like_path(value: str) -> bool:
    return value.startswith(("/", ".", "~")) or "\\" in value


def _or_under(roots: Sequence[Path], what: str) -> str:
    allowed = f", or {what} under the folders that the operator has allowed, by its path there"
    return allowed if roots else "; the operator has allowed no folder"
