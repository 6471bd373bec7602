"""Runs that compare the answers of both models, and a gate on their agreement."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import prune_workspace, report_in, reused_steps


@pytest.mark.usefixtures("in_one_process")
def test_the_gate_judges_the_greedy_agreement(workspace: Path, tmp_path: Path) -> None:
    """A run reports the agreement and fails a high bar; a lower bar is judged on the same measurement."""

    def section(least: float) -> dict[str, object]:
        generation = {"samples": 8, "new_tokens": 8}
        return {"generation": generation, "gate": {"min_greedy_agreement": least}}

    failed = prune_workspace(workspace, tmp_path, evaluation=section(1.0))
    assert failed.code == 3
    assert "greedy agreement" in failed.err
    report = report_in(tmp_path / "out")
    agreement = report["generation"]["agreement"]
    assert agreement["samples"] == 8
    assert 0 <= agreement["share"] < 1
    assert report["gate"]["bars"][0] | {"interval": None} == {
        "kind": "greedy agreement",
        "name": "greedy agreement",
        "minimum": 1.0,
        "measured": agreement["share"],
        "interval": None,
        "verdict": "fail",
        "samples": 8,
        "samples_needed": None,
        "reason": None,
    }
    assert any("no task generates answers" in warning for warning in report["warnings"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Greedy agreement" in page
    passed = prune_workspace(workspace, tmp_path, evaluation=section(0.001))
    assert passed.code == 0, passed.err
    assert reused_steps(tmp_path / "out")["evaluation"]
