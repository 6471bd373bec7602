"""A run folder that begins with products of another run, so that they are not made again.

Small files are copied. Weights are hard links where the file system allows them, otherwise copies: they take no space,
and deleting one of the two folders leaves the other whole. No file of a run folder is changed in place.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmprune.common.errors import OutputError
from llmprune.common.files import disk_errors, fsync, write_text
from llmprune.results.run_folder.products import (
    GENERATED_WINDOWS,
    HIDDEN_STATES,
    JOURNAL,
    LAYER_ORDER,
    LAYER_SCORES,
    LOCK,
    PLAN,
    PRODUCTS,
    RECOVERY_STATE,
    RECOVERY_WINDOWS,
    RECOVERY_WINDOWS_PARTS,
    SCORES,
    SEARCH_SO_FAR,
    SEARCH_TRIALS,
    SPEEDS,
    VOCABULARY_STATE,
)
from llmprune.results.run_folder.replacing import remove

logger = logging.getLogger(__name__)

# Files of the products that do not depend on the size alone, by their names in the journal.
_BEFORE_SIZE = {
    "self-generated windows": GENERATED_WINDOWS,
    "self-generated windows for recover": RECOVERY_WINDOWS,
    "scores": SCORES,
    "layer scores": LAYER_SCORES,
    "speed table": SPEEDS,
    "layer order": LAYER_ORDER,
}
_UNFINISHED = frozenset({
    "model.partial", HIDDEN_STATES, RECOVERY_STATE, RECOVERY_WINDOWS_PARTS, SEARCH_SO_FAR, SEARCH_TRIALS,
    VOCABULARY_STATE,
})  # fmt: skip
_OF_RESULT = frozenset({"report.json", "report.html", "evaluation.json", "published.json", "card"})  # made anew
_LEAST_LINKED = 2**20  # bytes; smaller files are copied: a person may edit them


class _InUse(OutputError):
    """Another run works in the folder."""


def take_scores(source: Path, folder: Path) -> None:
    """Begin ``folder`` with the scores of the run in ``source``, for a run of another size.

    A folder that holds a run already stays as it is. A product whose inputs differ in the new run is made again there.
    A run that still works in ``source`` gives what it has finished, because no file of a run is changed in place.
    Raises OutputError where ``source`` is not the folder of a run, or has no scores.
    """
    if _holds_run(folder):
        if not _holds_run(source):
            logger.warning("--scores-of %s: it is not the folder of a run, and %s holds a run already", source, folder)
        return
    try:
        with _reading(source):
            if not (source / SCORES).is_file():
                raise OutputError(
                    f"{source} has no {SCORES} to reuse: its recipe names all that is removed, or it has several "
                    "rounds or members; run without --scores-of"
                )
            _take(source, folder, names=[PLAN, *_BEFORE_SIZE.values()], products=_BEFORE_SIZE)
    except _InUse:
        finished = [name for name in _BEFORE_SIZE if name in _products(source)]
        if "scores" not in finished:
            raise
        _take(source, folder, names=[PLAN, *(_BEFORE_SIZE[name] for name in finished)], products=finished)


def has_scores(folder: Path) -> bool:
    """Return whether a run has scores that another one can begin with, also while it is still at work."""
    return (folder / SCORES).is_file() and "scores" in _products(folder)


def _products(source: Path) -> dict[str, Any]:
    """Return the products in a run's journal; none where it cannot be read."""
    try:
        found = json.loads((source / JOURNAL).read_text(encoding="utf-8"))["products"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def take_run(source: Path, folder: Path) -> None:
    """Begin ``folder`` with everything that the finished run in ``source`` has, but for report and measurements.

    A folder that holds a run already stays as it is. Raises OutputError where ``source`` has no finished run, or is in
    use.
    """
    if _holds_run(folder):
        return
    with _reading(source):
        if not (source / "report.json").is_file():
            raise OutputError(f"{source} has no report.json: its run is not finished; run it to the end first")
        _take(source, folder, names=[name for name in PRODUCTS if name not in _UNFINISHED | _OF_RESULT])


def _holds_run(folder: Path) -> bool:
    return (folder / JOURNAL).is_file()


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Hold a shared lock on a run folder, so that no run changes it meanwhile."""
    if not _holds_run(source):
        raise OutputError(f"{source} is not the folder of a run; give the folder that llmprune run wrote to")
    with (source / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _InUse(f"another run is using {source}; wait for it") from error
        yield


def _take(source: Path, folder: Path, *, names: Iterable[str], products: Container[str] | None = None) -> None:
    """Copy or link files into a new folder, which appears complete or not at all.

    ``products``: names of the products in the journal to keep; None: all.
    """
    if folder.exists() and (not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir())):
        raise OutputError(f"the output {folder} is not empty; give a new or empty folder")
    staging = folder.absolute().with_name(f"{folder.name}.partial")
    with disk_errors(folder.absolute().parent):
        remove(staging)
        staging.mkdir(parents=True)
        for name in names:
            _copy(source / name, staging / name)
        journal = json.loads((source / JOURNAL).read_text(encoding="utf-8"))
        if products is not None:
            journal["products"] = {name: made for name, made in journal["products"].items() if name in products}
        write_text(staging / JOURNAL, json.dumps(journal, indent=1) + "\n")
        (folder / LOCK).unlink(missing_ok=True)
        staging.rename(folder)
        fsync(folder.absolute().parent)


def _copy(place: Path, target: Path) -> None:
    """Copy a file or folder; link large files where possible. Links and hidden files are left out."""
    if place.is_symlink() or not place.exists():
        return
    if not place.is_dir():
        return _copy_file(place, target)
    target.mkdir()
    for entry in sorted(place.iterdir()):
        if not entry.name.startswith("."):
            _copy(entry, target / entry.name)
    return None


def _copy_file(place: Path, target: Path) -> None:
    if place.stat().st_size >= _LEAST_LINKED:
        try:
            os.link(place, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copy2(place, target)  # with its times, by which a folder's model is identified
