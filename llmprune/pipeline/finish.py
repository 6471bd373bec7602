"""The end of a run: the report is written, the model is pushed, and the gate decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprune.common.errors import GateNotMet
from llmprune.publish.push import publish_once, refusal
from llmprune.recipe.recipe import Recipe
from llmprune.report.html.family_page import render_family
from llmprune.report.html.page import render_page
from llmprune.report.runs import Run
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.folder import RunFolder
from llmprune.results.run_folder.products import FAMILY
from llmprune.results.sentences.evaluation import describe_verdict


@dataclass(frozen=True)
class FinishedRun:
    """A run whose report is written: the report, its recipe and its run folder. ``family``: all members of a family.

    Report and folder of a family are those of the first member that does not pass its gate, or of the smallest.
    """

    report: Report
    recipe: Recipe
    folder: Path
    family: tuple[Run, ...] = ()

    def require_gate(self) -> Report:
        """Return the report. Raises GateNotMet unless the recipe sets no gate or the gate is passed."""
        gate, hub = self.report.gate, self.recipe.hub
        if gate is None or gate.passed:
            return self.report
        unsent = "" if hub is None or hub.when == "always" else f"nothing was pushed to {hub.repo_id}; "
        raise GateNotMet(f"{self._failed_members()}{describe_verdict(gate)}; {unsent}see {self.folder / 'report.html'}")

    def _failed_members(self) -> str:
        """Return the members of a family that do not pass the gate, before the sentence on the first; else nothing."""
        failed = [one.name for one in self.family if one.report.gate is not None and not one.report.gate.passed]
        if not failed:
            return ""
        number = f"{failed[0]} does" if len(failed) == 1 else f"{', '.join(failed[:-1])} and {failed[-1]} do"
        plural = "" if len(failed) == 1 else "s"
        return f"member{plural} {number} not pass ({len(self.family)} in the family). Member {failed[0]}: "


def write_report(folder: RunFolder, report: Report) -> None:
    """Write a report as JSON and as an HTML page into its run folder."""
    folder.write("report.json", report.model_dump_json(indent=1) + "\n")
    folder.write("report.html", render_page(report))


def write_family(folder: RunFolder, family: Sequence[Run]) -> None:
    """Write the page that compares the members of a family. ``family``: the largest first."""
    folder.write(FAMILY, render_family(family))


def push_as_requested(recipe: Recipe, folder: RunFolder, *, report: Report) -> Report:
    """Push the model where the recipe asks for it and the gate permits it; return the report with the address.

    Raises HubError.
    """
    if recipe.hub is None or (recipe.hub.when != "always" and refusal(report)):
        return report
    published = publish_once(folder, recipe, hub=recipe.hub, report=report)
    pushed = {"hub": published.url}
    if published.quantized is not None:
        pushed["hub, quantized"] = published.quantized.url
    report = report.model_copy(update={"files": report.files | pushed})
    folder.write("report.json", report.model_dump_json(indent=1) + "\n")
    return report
