"""Finished jobs for tests of the service, without a run: the rows and files that one leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.reports import sample_report
from helpers.service import RECIPE, ServiceHarness
from llmprune.service.jobs.job import Outcome, figures_of

HEADER = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(16)


def report_json(**changes: Any) -> dict[str, Any]:
    """Return a whole report as JSON data, with other values at the top."""
    found: dict[str, Any] = json.loads(sample_report().model_dump_json())
    return found | changes


def finished(harness: ServiceHarness, name: str, report: dict[str, Any] | None = None, **submission: Any) -> str:
    """Return the id of a job that has ended with a report. ``submission``: text, headers and parameters."""
    job: str = harness.submit(submission.pop("text", RECIPE), name=name, **submission)["id"]
    given = report or report_json()
    write_run(harness.run_folder(job), given)
    assert harness.service.jobs.start(job, []) is not None
    figures = figures_of(given).model_dump_json()
    harness.service.jobs.end(job, Outcome("succeeded", 0, results={"figures": figures}))
    return job


def write_run(folder: Path, report: dict[str, Any] | None = None) -> Path:
    """Write the folder of a finished run with weights of 16 bytes, and return it."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report or report_json()))
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(WEIGHTS)
    return folder
