"""Combination of the scores of several sources."""

from __future__ import annotations

import torch

from llmprune.criteria.combine import combine_scores

NEWS, CODE = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([90.0, 10.0, 30.0, 20.0])


def test_the_mean_rank_gives_every_source_the_same_say() -> None:
    """The scale of a source's scores does not matter."""
    assert combine_scores([NEWS, CODE], "rank_mean").tolist() == [1.5, 0.5, 2.0, 2.0]
    assert combine_scores([NEWS, 1000 * CODE], "rank_mean").tolist() == [1.5, 0.5, 2.0, 2.0]


def test_the_worst_keeps_what_any_source_needs() -> None:
    """Ranked by the highest rank, and by the mean rank where those are equal."""
    assert combine_scores([NEWS, CODE], "worst").tolist() == [2, 0, 1, 3]


def test_equal_scores_share_a_rank() -> None:
    """Units that a source does not tell apart are ranked by the others."""
    equal, other = torch.zeros(3), torch.tensor([0.0, 2.0, 1.0])
    assert combine_scores([equal, other], "rank_mean").tolist() == [0.5, 1.5, 1.0]
    assert combine_scores([equal, other], "worst").tolist() == [0, 2, 1]


def test_neurons_are_ranked_within_their_expert() -> None:
    """Scores [E, F] are ranked along the last dimension."""
    scores_EF = torch.tensor([[1.0, 2.0], [30.0, 4.0]])
    assert combine_scores([scores_EF, scores_EF], "rank_mean").tolist() == [[0, 1], [1, 0]]


def test_a_single_source_is_returned() -> None:
    """Without a second source nothing is ranked."""
    assert combine_scores([NEWS], "worst") is NEWS
