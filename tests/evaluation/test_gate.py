"""Verdicts of the gate: bars, intervals, samples needed, reasons."""

from __future__ import annotations

import pytest
from helpers.task_results import answers, result, together, worse
from pydantic import ValidationError

from llmprune.evaluation.gate import judge
from llmprune.evaluation.greedy_agreement import estimate_agreement
from llmprune.evaluation.retention import Comparison, compare
from llmprune.recipe.evaluation import Gate
from llmprune.results.figures.evaluation import AnswerAgreement, GateFigures
from llmprune.results.sentences.evaluation import describe_verdict


def judged(least: float, dense: list[float], pruned: list[float], **more: float) -> GateFigures:
    """Return the gate's verdict on one task."""
    comparison = compare(together(result(*dense)), together(result(*pruned, answers="x")))
    figures = judge(Gate(min_retention=least, per_task=more), comparison)
    assert figures is not None
    return figures


def test_the_lower_end_decides() -> None:
    """A bar below the interval is passed, above it failed, and inside it undecided."""
    dense = answers(2, 400, 0.6)
    pruned = worse(dense, 0.1)
    for least, verdict in ((0.8, "pass"), (0.9, "not enough samples"), (0.91, "not enough samples"), (0.99, "fail")):
        gate = judged(least, dense, pruned)
        assert (gate.verdict, gate.passed) == (verdict, verdict == "pass"), least


def test_a_broken_model_fails() -> None:
    """Answers at random, where the dense model was right, fail."""
    gate = judged(0.9, answers(3, 300, 0.95), answers(4, 300, 0.5))
    assert gate.verdict == "fail"
    assert "the gate is not met" in describe_verdict(gate)


def test_an_undecided_gate_names_the_samples_needed() -> None:
    """The same flips over that many documents reach a verdict."""
    dense = answers(5, 200, 0.6)
    pruned = worse(dense, 0.04)
    gate = judged(0.93, dense, pruned)
    assert gate.verdict == "not enough samples"
    needed = gate.bars[0].samples_needed
    assert needed is not None
    assert f"about {needed:,} are needed" in describe_verdict(gate)
    times = -(-needed // 200)
    assert times > 1
    assert judged(0.93, dense * times, pruned * times).verdict == "pass"


def test_each_bar_has_its_verdict() -> None:
    """A single task can fail the gate while the mean passes it."""
    dense, pruned = answers(6, 500, 0.7), worse(answers(6, 500, 0.7), 0.05)
    gate = judged(0.8, dense, pruned, t=0.99)
    assert [(bar.name, bar.verdict) for bar in gate.bars] == [("mean", "pass"), ("t", "fail")]
    assert gate.verdict == "fail"
    assert "t retention 94." in describe_verdict(gate)


def test_a_gate_with_nothing_to_judge_is_undecided() -> None:
    """A dense score of zero has no ratio: the gate is undecided, with the reason. No gate has no verdict."""
    assert judge(None, Comparison()) is None
    zero = together(result(0.0, 0.0))
    gate = judge(Gate(min_retention=0.9), compare(zero, zero))
    assert gate is not None
    assert (gate.retention, gate.verdict, gate.passed) == (None, "no interval", False)
    said = "mean retention unknown, required: at least 90.00%: t: dense 0 and pruned 0 have no ratio"
    assert said in describe_verdict(gate)
    nothing = judge(Gate(min_retention=0.9), Comparison())
    assert nothing is not None
    assert "no task was evaluated" in describe_verdict(nothing)


def test_a_bar_for_a_group_of_one_task_judges_that_task() -> None:
    """A group of one task has that task's documents."""
    dense = together(result(*answers(7, 400, 0.6), group="g"))
    pruned = together(result(*worse(answers(7, 400, 0.6), 0.2), group="g", answers="x"))
    gate = judge(Gate(min_retention=0.5, per_task={"g": 0.9}), compare(dense, pruned))
    assert gate is not None
    assert [(bar.name, bar.verdict) for bar in gate.bars] == [("mean", "pass"), ("g", "fail")]
    assert gate.bars[1].measured == pytest.approx(0.8, abs=0.01)


def test_a_bar_that_has_no_interval_says_why() -> None:
    """A group with different metrics, a corpus metric and a missing task leave the gate undecided, with the reason."""
    tasks = together(
        result(1.0, task="a", group="g"),
        result(1.0, task="b", group="g", metric="f1"),
        result(0.5, task="corpus", value=0.7),
    )
    gate = judge(Gate(min_retention=0.5, per_task={"g": 0.9, "corpus": 0.9, "gone": 0.9}), compare(tasks, tasks))
    assert gate is not None
    assert [bar.verdict for bar in gate.bars] == ["pass", "no interval", "no interval", "no interval"]
    assert [bar.reason for bar in gate.bars] == [
        None,
        "its tasks have different metrics (a acc, b f1), so they have no common score",
        "its metric is not a mean over samples, so it has no interval",
        "it was not evaluated",
    ]
    assert "g retention unknown, required: at least 90.00%: its tasks have different metrics" in describe_verdict(gate)


@pytest.mark.parametrize(
    "wrong", [{"min_retention": 0}, {"min_retention": 1.1}, {"confidence": 1.0}, {"per_task": {"t": 2.0}}]
)
def test_impossible_gates_are_refused(wrong: dict[str, object]) -> None:
    """Retention and confidence outside their ranges are refused."""
    with pytest.raises(ValidationError):
        Gate.model_validate({"min_retention": 0.9} | wrong)


@pytest.mark.parametrize(("least", "verdict"), [(0.5, "pass"), (0.75, "not enough samples"), (0.95, "fail")])
def test_a_bar_of_greedy_agreement(least: float, verdict: str) -> None:
    """The interval over answers decides, without any task; the remedy of too few answers is more answers."""
    counts = [AnswerAgreement(same=same, tokens=60, first=same) for same in (30, 45, 60) * 10]
    agreement = estimate_agreement(counts, confidence=0.95)
    figures = judge(Gate(min_greedy_agreement=least), Comparison(), agreement=agreement)
    assert figures is not None
    assert (figures.verdict, figures.min_retention) == (verdict, None)
    if verdict != "pass":
        said = describe_verdict(figures)
        assert "greedy agreement 75.00% (" in said
        assert ("raise evaluation.generation.samples" in said) is (verdict == "not enough samples")


def test_a_missing_agreement_leaves_the_gate_undecided() -> None:
    """Where the answers were not compared, the bar has no interval, with the reason."""
    figures = judge(Gate(min_greedy_agreement=0.5), Comparison())
    assert figures is not None
    assert figures.verdict == "no interval"
    assert "greedy agreement unknown, required: at least 50.00%: it was not measured" in describe_verdict(figures)
