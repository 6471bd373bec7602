"""Scores before and after a training, each ratio with the interval of its own pairs; and what the recipe may ask."""

from __future__ import annotations

import pytest
from helpers.task_results import answers, result, together, worse

from llmprune.evaluation.recovery_scores import compare_recovery
from llmprune.recipe.evaluation import Evaluation


def test_each_ratio_has_the_interval_of_its_own_pairs() -> None:
    """Before the training is measured against dense, after it against before; flips are those of the training."""
    dense = answers(0, 400, 0.8)
    before = worse(dense, 0.3)
    after = [max(pair) for pair in zip(before, worse(dense, 0.1), strict=True)]
    found = compare_recovery(together(result(*dense)), together(result(*before)), after=together(result(*after)))
    (score,) = found.scores
    assert (score.dense, score.before, score.after) == pytest.approx([sum(one) / 400 for one in (dense, before, after)])
    assert (score.lost, score.gained) == (0, sum(after) - sum(before))
    assert score.retention_before == pytest.approx(sum(before) / sum(dense))
    assert score.gain == pytest.approx(sum(after) / sum(before))
    assert score.gain_interval is not None
    assert 1 < score.gain_interval.low < score.gain < score.gain_interval.high
    assert found.retention_before is not None
    assert found.gain is not None
    assert (found.retention_before.ratio, found.gain.ratio) == (score.retention_before, score.gain)


def test_groups_stand_before_their_tasks() -> None:
    """A group has a row of its own, over the documents of all its tasks."""
    one, two = result(1.0, 0.0, task="a", group="g"), result(1.0, 1.0, task="b", group="g")
    found = compare_recovery(together(one, two), together(one, two), after=together(one, two))
    assert [(score.task, score.samples) for score in found.scores] == [("g", 4), ("a", 2), ("b", 2)]


def test_models_behind_an_address_have_none_from_before() -> None:
    """Only dense and pruned are served there."""
    served = {"name": "local-completions", "args": {"base_url": "http://localhost/v1"}}
    with pytest.raises(ValueError, match="only dense and pruned are served"):
        Evaluation.model_validate({"before_recovery": True, "backend": served})
