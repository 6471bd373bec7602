"""End of a run: the gate decides the exit code, and its error names every model that does not pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.reports import sample_report

from llmprune.common.errors import GateNotMet
from llmprune.pipeline.finish import FinishedRun
from llmprune.recipe.recipe import Recipe
from llmprune.report.runs import Run
from llmprune.results.report_schema import Report

RECIPE = Recipe.parse("model: {id: tiny}")


def report(*, passed: bool) -> Report:
    """Return a report whose gate has this verdict."""
    sample = sample_report()
    assert sample.gate is not None
    return sample.model_copy(update={"gate": sample.gate.model_copy(update={"passed": passed})})


def test_a_family_names_every_member_that_does_not_pass() -> None:
    """The sentence on the first follows."""
    members = tuple(Run(str(place), report(passed=place == 1)) for place in (1, 2, 3))
    finished = FinishedRun(members[1].report, RECIPE, Path("members/2"), members)
    with pytest.raises(GateNotMet, match=r"^members 2 and 3 do not pass \(3 in the family\)\. Member 2: "):
        finished.require_gate()
    one = replace(finished, family=(members[0], members[1]))
    with pytest.raises(GateNotMet, match=r"^member 2 does not pass \(2 in the family\)\. Member 2: "):
        one.require_gate()


def test_a_single_run_names_its_report() -> None:
    """Nothing else is said of it; a passed gate returns the report."""
    with pytest.raises(GateNotMet, match=r"report\.html$") as refused:
        FinishedRun(report(passed=False), RECIPE, Path("runs/x")).require_gate()
    assert "member" not in str(refused.value)
    assert FinishedRun(report(passed=True), RECIPE, Path("runs/x")).require_gate().gate
