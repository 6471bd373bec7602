"""Whether a report speaks against publishing its model."""

from __future__ import annotations

from llmprune.report.value import Report
from llmprune.report.wording import percent


def refusal(report: Report) -> str | None:
    """Why the model should not be published, as a sentence; None where the gate was met, or none was set."""
    if report.gate is None or report.gate.passed:
        return None
    return (
        f"the gate asks for a mean retention of at least {percent(report.gate.min_retention, 2)}, "
        f"and the model has {percent(report.gate.retention, 2)}"
    )
