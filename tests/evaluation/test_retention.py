"""What was kept, and how sure that is: joining, intervals, p-values, the mean and the gate. Numbers only, no models."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.task_results import answers, result
from numpy.typing import NDArray
from pydantic import ValidationError

from llmprune.common.errors import EvaluationError
from llmprune.evaluation.gate import judge
from llmprune.evaluation.lm_eval.results import Answer, TaskResult, TaskResults
from llmprune.evaluation.retention import Comparison, compare
from llmprune.evaluation.statistics import interval, mcnemar, mean_draws, ratio_draws, samples_needed
from llmprune.recipe.evaluation import Gate
from llmprune.results.evaluation_figures import GateFigures
from llmprune.results.sentences import describe_verdict


def together(*tasks: TaskResult) -> TaskResults:
    """All that one model reached."""
    return TaskResults(tasks=tasks)


def worse(values: list[float], share: float) -> list[float]:
    """The same answers, this share of the right ones lost."""
    rights = [place for place, value in enumerate(values) if value]
    lost = set(rights[: round(share * len(rights))])
    return [0.0 if place in lost else value for place, value in enumerate(values)]


def judged(least: float, dense: list[float], pruned: list[float], **more: float) -> GateFigures:
    """The gate's verdict over one task."""
    comparison = compare(together(result(*dense)), together(result(*pruned, answers="x")))
    figures = judge(Gate(min_retention=least, per_task=more), comparison)
    assert figures is not None
    return figures


def test_same_model_keeps_everything() -> None:
    """Identical answers keep 1 exactly, with no doubt left, p = 1 and a passed gate."""
    dense = together(result(1.0, 0.0, 1.0), result(0.0, 1.0, task="u"))
    comparison = compare(dense, TaskResults.from_json(dense.to_json()))
    for figures in comparison.tasks:
        assert figures.interval is not None
        assert (figures.retention, figures.interval.low, figures.interval.high) == (1.0, 1.0, 1.0)
        assert (figures.lost, figures.gained, figures.p_value, figures.identical) == (0, 0, 1.0, True)
    assert comparison.mean is not None
    assert (comparison.mean.retention, comparison.mean.interval.low) == (1.0, 1.0)
    gate = judge(Gate(min_retention=1.0), comparison)
    assert gate is not None
    assert (gate.passed, gate.verdict) == (True, "pass")


def test_equal_scores_of_another_model_leave_doubt() -> None:
    """As many right answers by a model that answers otherwise keep 1, and the interval says how far that goes."""
    values = answers(0, 50, 0.5)
    (figures,) = compare(together(result(*values)), together(result(*values, answers="other"))).tasks
    assert figures.interval is not None
    assert figures.retention == 1.0
    assert not figures.identical
    assert 0.9 < figures.interval.low < 1.0 < figures.interval.high < 1.2


def test_flips_are_counted() -> None:
    """Lost and gained samples are counted apart, so that they do not hide each other."""
    dense, pruned = result(1.0, 1.0, 1.0, 0.0, 0.0), result(0.0, 0.0, 1.0, 1.0, 0.0)
    (figures,) = compare(together(dense), together(pruned)).tasks
    assert (figures.lost, figures.gained) == (2, 1)
    assert figures.retention == pytest.approx(2 / 3)
    assert figures.p_value == 1.0


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375), (0, 1, 1.0)])
def test_mcnemar_is_exact(lost: int, gained: int, p: float) -> None:
    """The two-sided binomial probability of flips at least this uneven: (5, 0) is 2 / 2^5."""
    assert mcnemar(lost, gained) == pytest.approx(p)


@pytest.mark.parametrize("values", [(0.5, 1.0), (None, None)])
def test_no_flips_without_right_and_wrong(values: tuple[float | None, ...]) -> None:
    """A metric that is not 0 or 1 for each sample has neither flips nor a p-value."""
    (figures,) = compare(together(result(*values)), together(result(*values))).tasks
    assert (figures.lost, figures.gained, figures.p_value) == (None, None, None)


def test_graded_metrics_have_an_interval() -> None:
    """A metric between 0 and 1, such as ROUGE, is resampled as it is."""
    values = np.random.default_rng(1).random(300).tolist()
    pruned = [0.9 * value for value in values]
    (figures,) = compare(together(result(*values)), together(result(*pruned))).tasks
    assert figures.interval is not None
    assert figures.retention == pytest.approx(0.9)
    assert 0.88 < figures.interval.low < 0.9 < figures.interval.high < 0.92


def test_lower_is_better() -> None:
    """Where less is better, a rising metric lowers retention."""
    dense, pruned = (result(*values, higher_is_better=False) for values in ([0.2, 0.2], [0.25, 0.25]))
    (figures,) = compare(together(dense), together(pruned)).tasks
    assert figures.retention == pytest.approx(0.8)
    assert not figures.higher_is_better
    assert figures.interval is not None
    assert figures.interval.low <= 0.8


@pytest.mark.parametrize(("higher_is_better", "flips"), [(True, (2, 1)), (False, (1, 2))])
def test_an_answer_is_lost_where_it_became_worse(higher_is_better: bool, flips: tuple[int, int]) -> None:
    """Of a metric where lower is better, such as an error rate, 0 is right: 0 to 1 is lost and 1 to 0 is gained."""
    dense, pruned = (1.0, 1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0, 0.0)
    sides = [together(result(*values, higher_is_better=higher_is_better)) for values in (dense, pruned)]
    (figures,) = compare(*sides).tasks
    assert (figures.lost, figures.gained) == flips


@pytest.mark.parametrize("change", [{"value": 0.7}, {"value": -1.0}])
def test_what_is_no_mean_over_samples_has_no_interval(change: dict[str, float]) -> None:
    """A corpus metric (perplexity, BLEU) or a negative one is reported and not counted in the mean."""
    odd = result(0.5, 0.5, task="odd", **change)
    comparison = compare(together(odd, result(1.0, 0.0)), together(odd, result(1.0, 0.0)))
    assert comparison.tasks[0].interval is None
    assert comparison.mean is not None
    assert (comparison.mean.counted, comparison.mean.left_out) == (("t",), ("odd",))


def test_zero_has_no_retention() -> None:
    """A dense model at zero gives no retention, and the task does not count in the mean."""
    zero, half = ((0.0, 0.0), (1.0, 0.0)), ((1.0, 1.0), (1.0, 0.0))
    dense, pruned = (together(result(*zero[side], task="zero"), result(*half[side], task="half")) for side in (0, 1))
    comparison = compare(dense, pruned)
    assert comparison.tasks[0].retention is None
    assert comparison.mean is not None
    assert comparison.mean.retention == 0.5
    assert compare(together(dense.tasks[0]), together(pruned.tasks[0])).mean is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"doc_hash": "other"}, "the document of sample 1 is not the same"),
        ({"prompt_hash": "other"}, "the prompt of sample 1 is not the same"),
        ({"doc_id": 99}, "2 without their pair"),
    ],
)
def test_mismatched_samples_are_refused(change: dict[str, object], said: str) -> None:
    """Another document, another prompt or another set of samples is no comparison."""
    dense = result(1.0, 0.0)
    other = dense.model_copy(update={"samples": (dense.samples[0], dense.samples[1].model_copy(update=change))})
    with pytest.raises(EvaluationError, match=said):
        compare(together(dense), together(other))


@pytest.mark.parametrize("change", [{"metric": "f1"}, {"filter": "strict"}, {"higher_is_better": False}])
def test_mismatched_tasks_are_refused(change: dict[str, object]) -> None:
    """A task that only one model has, or another metric, filter or direction, is named."""
    with pytest.raises(EvaluationError, match="only one of dense and pruned was evaluated on t"):
        compare(together(result(1.0)), together())
    (name,) = change
    with pytest.raises(EvaluationError, match=f"{name} is .* for dense and .* for pruned"):
        compare(together(result(1.0)), together(result(1.0, **change)))


def test_a_group_counts_once() -> None:
    """Documents of a group are judged together, and the mean takes the group for one task."""
    parts = [((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)), ((1.0, 1.0), (1.0, 1.0))]
    names, groups = ("a", "b", "alone"), ("g", "g", None)
    dense, pruned = (
        together(
            *(
                result(*part[side], task=name, group=group, documents=10)
                for part, name, group in zip(parts, names, groups, strict=True)
            )
        )
        for side in (0, 1)
    )
    comparison = compare(dense, pruned)
    (group,) = comparison.groups
    assert (group.task, group.samples, group.documents) == ("g", 6, 20)
    assert (group.dense, group.pruned, group.retention) == (5 / 6, 3 / 6, pytest.approx(3 / 5))
    assert comparison.mean is not None
    assert comparison.mean.counted == ("g", "alone")
    assert comparison.mean.retention == pytest.approx((3 / 5 + 1) / 2)


def test_tasks_of_a_group_with_different_metrics_count_each() -> None:
    """What cannot be put together stands alone."""
    tasks = (result(1.0, task="a", group="g"), result(1.0, task="b", group="g", metric="f1"))
    comparison = compare(together(*tasks), together(*tasks))
    assert comparison.groups == ()
    assert comparison.mean is not None
    assert comparison.mean.counted == ("a", "b")


def test_what_both_wrote_is_kept_side_by_side() -> None:
    """Generative tasks bring the first answers of both."""
    dense, pruned = (
        result(1.0).model_copy(update={"answers": (Answer(doc_id=0, prompt="2 + 2 =", text=text),)})
        for text in ("4", "5")
    )
    (figures,) = compare(together(dense), together(pruned)).tasks
    assert [(one.prompt, one.dense, one.pruned) for one in figures.examples] == [("2 + 2 =", "4", "5")]


def test_the_lower_end_decides() -> None:
    """A bar below the interval is passed, above it failed, and inside it nobody can tell."""
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


def test_undecided_says_how_many_samples_would_tell() -> None:
    """The number is enough: the same flips over so many documents reach a verdict."""
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


def test_samples_needed_has_limits() -> None:
    """More where the bar is nearer; none where it is met exactly or no number in reach would do."""
    near, far = (samples_needed(100, 0.95, edge=0.9, bar=bar, confidence=0.95) for bar in (0.94, 0.91))
    assert near is not None
    assert far is not None
    assert near > far > 100
    assert samples_needed(100, 0.95, edge=0.9, bar=0.95, confidence=0.95) is None
    assert samples_needed(100, 0.95, edge=0.9, bar=0.95 - 1e-9, confidence=0.95) is None


def test_each_bar_has_its_verdict() -> None:
    """A single task can fail the gate while the mean passes it."""
    dense, pruned = answers(6, 500, 0.7), worse(answers(6, 500, 0.7), 0.05)
    gate = judged(0.8, dense, pruned, t=0.99)
    assert [(bar.name, bar.verdict) for bar in gate.bars] == [("mean", "pass"), ("t", "fail")]
    assert gate.verdict == "fail"
    assert "t retention 94." in describe_verdict(gate)


def test_a_gate_with_nothing_to_judge_is_undecided() -> None:
    """A dense model that scores zero leaves no ratio: the gate is undecided and says why. No gate asks nothing."""
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
    """A group is the documents of its tasks, also where it has one."""
    dense = together(result(*answers(7, 400, 0.6), group="g"))
    pruned = together(result(*worse(answers(7, 400, 0.6), 0.2), group="g", answers="x"))
    gate = judge(Gate(min_retention=0.5, per_task={"g": 0.9}), compare(dense, pruned))
    assert gate is not None
    assert [(bar.name, bar.verdict) for bar in gate.bars] == [("mean", "pass"), ("g", "fail")]
    assert gate.bars[1].retention == pytest.approx(0.8, abs=0.01)


def test_a_bar_that_has_no_interval_says_why() -> None:
    """A group with different metrics and a corpus metric leave the gate undecided, each with its reason."""
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
        "its tasks have different metrics (a acc, b f1), so they have no figure together",
        "its metric is no mean over samples, so it has no interval",
        "it was not evaluated",
    ]
    assert "g retention unknown, required: at least 90.00%: its tasks have different metrics" in describe_verdict(gate)


@pytest.mark.parametrize(
    "wrong", [{"min_retention": 0}, {"min_retention": 1.1}, {"confidence": 1.0}, {"per_task": {"t": 2.0}}]
)
def test_impossible_gates_are_refused(wrong: dict[str, object]) -> None:
    """Shares lie between 0 and 1, and nothing is certain."""
    with pytest.raises(ValidationError):
        Gate.model_validate({"min_retention": 0.9} | wrong)


def _cells(accuracy: float, retention: float, correlation: float) -> NDArray[np.float64]:
    """Chances that both, only dense, only pruned, and neither are right."""
    other = accuracy * retention
    spread = correlation * (accuracy * (1 - accuracy) * other * (1 - other)) ** 0.5
    both = min(accuracy * other + spread, other)
    return np.array([both, accuracy - both, other - both, 1 - accuracy - other + both])


def _values(counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Dense and pruned outcomes with these counts of the four cells."""
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


@pytest.mark.parametrize(
    ("samples", "accuracy", "retention", "correlation"),
    [(100, 0.5, 0.95, 0.7), (300, 0.8, 0.9, 0.8), (1000, 0.3, 0.99, 0.5)],
)
def test_intervals_cover_the_truth(samples: int, accuracy: float, retention: float, correlation: float) -> None:
    """Of 1,000 draws with known accuracies, the 95 % interval has the true ratio in 93 to 97 of a hundred."""
    generator = np.random.default_rng(samples)
    drawn = generator.multinomial(samples, _cells(accuracy, retention, correlation), size=1000)
    covered = 0
    for place, counts in enumerate(drawn):
        dense_N, pruned_N = _values(counts)
        ratio = pruned_N.mean() / dense_N.mean()
        low, high = interval(ratio_draws(dense_N, pruned_N, name=f"{place}", draws=1000), ratio, confidence=0.95)
        covered += low <= retention <= high
    assert 930 <= covered <= 970


def test_intervals_of_the_mean_cover_the_truth() -> None:
    """The same for the mean over three tasks of different size and difficulty."""
    tasks = ((200, 0.4, 0.95, 0.7), (500, 0.7, 0.9, 0.8), (100, 0.9, 0.98, 0.6))
    truth = float(np.mean([retention for _, _, retention, _ in tasks]))
    generator = np.random.default_rng(7)
    drawn = [generator.multinomial(size, _cells(*rest), size=1000) for size, *rest in tasks]
    covered = 0
    for place in range(1000):
        pairs = {f"{task}-{place}": _values(counts[place]) for task, counts in enumerate(drawn)}
        point = float(np.mean([pruned_N.mean() / dense_N.mean() for dense_N, pruned_N in pairs.values()]))
        draws = {name: ratio_draws(*pair, name=name, draws=500) for name, pair in pairs.items()}
        low, high = interval(mean_draws(draws), point, confidence=0.95)
        covered += low <= truth <= high
    assert 930 <= covered <= 970
