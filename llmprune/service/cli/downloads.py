"""Folders of downloaded files. Each holds the files of one job, from one end of that job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune.common.errors import OutputError
from llmprune.common.files import write_text

MARK = ".llmprune-job.json"


def claim(folder: Path, job: str, *, finished: float | None, names: Sequence[str]) -> bool:
    """Write into a folder which job its files belong to; return whether files in it can be kept.

    ``finished``: when the job ended; None while it runs, for its files still change. Raises OutputError where the
    folder has files of another job, of an earlier end of this job, or files of these names of unknown origin.
    """
    mine = {"job": job, "finished": finished}
    known = _read(folder)
    if known is None:
        taken = [name for name in names if (folder / name).exists()]
        if taken:
            raise OutputError(
                f"{folder} has {taken[0]} already, and no record of which job it belongs to; choose another --output"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the folder {folder} cannot be made: {error}; choose another --output") from error
        write_text(folder / MARK, json.dumps(mine) + "\n")
        return False
    if known.get("job") != job:
        raise OutputError(f"{folder} has the files of job {known.get('job')}; choose another --output")
    if known != mine:
        raise OutputError(
            f"{folder} has files of job {job} from before it ended last, and some may differ now; "
            "choose another --output, or remove the folder"
        )
    return finished is not None


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the record of an earlier download; None where there is none."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder / MARK} cannot be read: {error}; choose another --output") from error
    return found if isinstance(found, dict) else {}
