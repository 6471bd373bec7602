"""Retention: results joined by document, flips, intervals, groups and the mean. Numbers only, no models."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.task_results import answers, result, together

from llmprune.common.errors import EvaluationError
from llmprune.evaluation.gate import judge
from llmprune.evaluation.lm_eval.results import Answer, TaskResults
from llmprune.evaluation.retention import compare
from llmprune.recipe.evaluation import Gate


def test_same_model_keeps_everything() -> None:
    """Identical answers have retention 1, an interval of zero width, p = 1 and a passed gate."""
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
    """Equal scores of a model with other answers have retention 1, with an interval around it."""
    values = answers(0, 50, 0.5)
    (figures,) = compare(together(result(*values)), together(result(*values, answers="other"))).tasks
    assert figures.interval is not None
    assert figures.retention == 1.0
    assert not figures.identical
    assert 0.9 < figures.interval.low < 1.0 < figures.interval.high < 1.2


def test_flips_are_counted() -> None:
    """Lost and gained samples are counted separately, so that they do not cancel."""
    dense, pruned = result(1.0, 1.0, 1.0, 0.0, 0.0), result(0.0, 0.0, 1.0, 1.0, 0.0)
    (figures,) = compare(together(dense), together(pruned)).tasks
    assert (figures.lost, figures.gained) == (2, 1)
    assert figures.retention == pytest.approx(2 / 3)
    assert figures.p_value == 1.0


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
    """If lower is better, a rising metric lowers retention."""
    dense, pruned = (result(*values, higher_is_better=False) for values in ([0.2, 0.2], [0.25, 0.25]))
    (figures,) = compare(together(dense), together(pruned)).tasks
    assert figures.retention == pytest.approx(0.8)
    assert not figures.higher_is_better
    assert figures.interval is not None
    assert figures.interval.low <= 0.8


@pytest.mark.parametrize(("higher_is_better", "flips"), [(True, (2, 1)), (False, (1, 2))])
def test_an_answer_is_lost_where_it_became_worse(higher_is_better: bool, flips: tuple[int, int]) -> None:
    """If lower is better, as for an error rate, 0 is right: 0 to 1 is lost and 1 to 0 is gained."""
    dense, pruned = (1.0, 1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0, 0.0)
    sides = [together(result(*values, higher_is_better=higher_is_better)) for values in (dense, pruned)]
    (figures,) = compare(*sides).tasks
    assert (figures.lost, figures.gained) == flips


@pytest.mark.parametrize("change", [{"value": 0.7}, {"value": -1.0}])
def test_a_metric_that_is_not_a_mean_has_no_interval(change: dict[str, float]) -> None:
    """A corpus metric (perplexity, BLEU) or a negative one is reported but not in the mean."""
    odd = result(0.5, 0.5, task="odd", **change)
    comparison = compare(together(odd, result(1.0, 0.0)), together(odd, result(1.0, 0.0)))
    assert comparison.tasks[0].interval is None
    assert comparison.mean is not None
    assert (comparison.mean.counted, comparison.mean.left_out) == (("t",), ("odd",))


def test_zero_has_no_retention() -> None:
    """A dense score of zero has no retention, and the task is not in the mean."""
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
        ({"doc_id": 99}, "2 of them unpaired"),
    ],
)
def test_mismatched_samples_are_refused(change: dict[str, object], said: str) -> None:
    """Another document, another prompt or another set of samples is refused."""
    dense = result(1.0, 0.0)
    other = dense.model_copy(update={"samples": (dense.samples[0], dense.samples[1].model_copy(update=change))})
    with pytest.raises(EvaluationError, match=said):
        compare(together(dense), together(other))


@pytest.mark.parametrize("change", [{"metric": "f1"}, {"filter": "strict"}, {"higher_is_better": False}])
def test_mismatched_tasks_are_refused(change: dict[str, object]) -> None:
    """A task of only one model, or another metric, filter or direction, is refused."""
    with pytest.raises(EvaluationError, match="only one of dense and pruned was evaluated on t"):
        compare(together(result(1.0)), together())
    (name,) = change
    with pytest.raises(EvaluationError, match=f"{name} is .* for dense and .* for pruned"):
        compare(together(result(1.0)), together(result(1.0, **change)))


def test_a_group_counts_once() -> None:
    """A group pools its documents, and counts as one task in the mean."""
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
    """Tasks that cannot be pooled count separately."""
    tasks = (result(1.0, task="a", group="g"), result(1.0, task="b", group="g", metric="f1"))
    comparison = compare(together(*tasks), together(*tasks))
    assert comparison.groups == ()
    assert comparison.mean is not None
    assert comparison.mean.counted == ("a", "b")


def test_answers_of_both_models_are_paired() -> None:
    """Generative tasks have the first answers of both models as examples."""
    dense, pruned = (
        result(1.0).model_copy(update={"answers": (Answer(doc_id=0, prompt="2 + 2 =", text=text),)})
        for text in ("4", "5")
    )
    (figures,) = compare(together(dense), together(pruned)).tasks
    assert [(one.prompt, one.dense, one.pruned) for one in figures.examples] == [("2 + 2 =", "4", "5")]
