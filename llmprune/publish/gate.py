"""Whether a report speaks against publishing its model."""

from __future__ import annotations

from llmprune.results.formatting import describe_bar
from llmprune.results.schema import Report


def refusal(report: Report) -> str | None:
    """Why the model should not be published, as a sentence; None where the gate was met, or none was set."""
    if report.gate is None or report.gate.passed:
        return None
    missed = (describe_bar(bar, 2) for bar in report.gate.bars if bar.verdict != "pass")
    return f"the gate was not passed: {'; '.join(missed)}"
