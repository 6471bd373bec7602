"""Warnings of a comparison, and the differences of recipes."""

from __future__ import annotations

from typing import Any

from helpers.reports import sample_report

from llmprune.results.comparison import ComparedRun, Difference, comparison_warnings, recipe_differences


def run(model: str = "m", samples: int = 10, **evaluation: Any) -> ComparedRun:
    """Return a run with one task."""
    data = {"provenance": {"model": model}, "recipe": {"evaluation": evaluation}}
    return ComparedRun.model_validate(data | {"tasks": [{"task": "arc", "samples": samples}]})


def test_another_base_evaluation_or_number_of_samples_is_a_warning() -> None:
    """Each difference that makes figures incomparable has one sentence; other sections have none."""
    assert comparison_warnings([run(), run()]) == ()
    assert comparison_warnings([run(), run("n")]) == ("the runs prune different models",)
    (settings,) = comparison_warnings([run(limit=10), run(limit=20)])
    assert "different settings" in settings
    (samples,) = comparison_warnings([run(), run(samples=20)])
    assert samples == "the runs were evaluated on different numbers of samples of arc"
    assert comparison_warnings([run(gate={"min_retention": 0.9}), run()]) == ()


def test_a_report_and_its_json_are_compared_alike() -> None:
    """The compared part of a report is the same from the value and from its JSON."""
    report = sample_report()
    assert ComparedRun.model_validate(report) == ComparedRun.model_validate(report.model_dump(mode="json"))


def test_only_keys_that_differ_are_listed() -> None:
    """Keys are dotted; a missing key and none are the same; a recipe that is unknown is not compared."""
    first: dict[str, Any] = {"depth": {"remove": 1, "layers": None}, "width": {"mlp": 0.5}, "names": ["a"]}
    second: dict[str, Any] = {"depth": {"remove": 2}, "names": ["a"]}
    assert recipe_differences([first, second, None]) == [
        Difference("depth.remove", ("1", "2", None)),
        Difference("width.mlp", ("0.5", None, None)),
    ]
    assert recipe_differences([first, first]) == recipe_differences([first, None]) == []
    (long,) = recipe_differences([{"a": "x" * 1000}, {"a": "y"}])
    assert len(long.values[0] or "") < 300
