"""Reading of ``report.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmprune.common.errors import OutputError
from llmprune.results.figures.base import SCHEMA_VERSION
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.products import FAMILY, JOURNAL, MEMBERS


def load_report(folder: Path) -> Report:
    """Read the report of a run folder, or a ``report.json``.

    Raises OutputError if the run is not finished, or the file is damaged or of another schema version.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    if not path.is_file():
        raise OutputError(f"{folder} has no report.json; {_remedy(folder)}")
    try:
        text = path.read_text(encoding="utf-8")
        return parse_report(json.loads(text), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OutputError(
            f"{path} cannot be read as a report ({error}); give the folder of a run, or run the recipe again"
        ) from error


def parse_report(found: Any, source: str, *, extra: Literal["forbid", "ignore"] = "forbid") -> Report:
    """Return the report in the JSON data of a ``report.json``. ``extra``: treatment of fields that it should not have.

    Raises OutputError for another schema version, and for wrong fields. ``source``: for the message.
    """
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise OutputError(
            f"{source} has schema {version}, and this version of llmprune reads {SCHEMA_VERSION}; "
            "run the recipe again with this version"
        )
    try:
        return Report.model_validate(found, extra=extra)
    except ValidationError as error:
        wrong = f"{error.error_count()} fields are wrong"
        raise OutputError(f"{source} cannot be read ({wrong}); run the recipe again") from error


def _remedy(folder: Path) -> str:
    """Return what to do about a folder that has no report."""
    if (folder / FAMILY).is_file():
        return f"it holds a family of models: give one of them, such as {folder / MEMBERS / '1'}"
    if (folder / JOURNAL).is_file():
        return "the run is not finished: run it again to continue it"
    return "give the folder of a run"
