"""Reading of ``report.json``."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from llmprune.common.errors import OutputError
from llmprune.results.figures import SCHEMA_VERSION
from llmprune.results.products import FAMILY, JOURNAL, MEMBERS
from llmprune.results.report_schema import Report


def load_report(folder: Path) -> Report:
    """Read the report of a run folder, or a ``report.json``.

    Raises OutputError if the run is not finished, or the file is damaged or of another schema version.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    if not path.is_file():
        raise OutputError(f"{folder} has no report.json; {_remedy(folder)}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise OutputError(
                f"{path} has schema {version}, and this version of llmprune reads {SCHEMA_VERSION}; "
                "run the recipe again with this version"
            )
        return Report.model_validate_json(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        reason = f"{error.error_count()} fields are wrong" if isinstance(error, ValidationError) else error
        raise OutputError(f"{path} cannot be read ({reason}); run the recipe again") from error


def _remedy(folder: Path) -> str:
    """Return what to do about a folder that has no report."""
    if (folder / FAMILY).is_file():
        return f"it holds a family of models: give one of them, such as {folder / MEMBERS / '1'}"
    if (folder / JOURNAL).is_file():
        return "the run is not finished: run it again to continue it"
    return "give the folder of a run"
