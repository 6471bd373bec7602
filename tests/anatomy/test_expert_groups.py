"""Experts that a router chooses in groups."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.families import GROUPED

from llmprune.anatomy.discovery import discover
from llmprune.cut.decision import choose_in_groups
from llmprune.testing import tiny_config


@pytest.mark.parametrize(
    ("overrides", "groups", "possible"),
    [
        ({}, 3, (6, 9, 12)),  # the router adds up the two best scores of each group
        ({"num_experts_per_tok": 6}, 3, (9, 12)),  # two groups have to provide six experts
        ({"topk_group": 3}, 3, (6, 9, 12)),  # all groups are chosen, and still have to be of equal size
        ({"n_group": 1, "topk_group": 1}, 1, range(2, 13)),
    ],
)
def test_groups_of_experts_are_found(overrides: dict[str, int], groups: int, possible: Sequence[int]) -> None:
    """The number of groups, and the numbers of experts that they allow, are found by running the router."""
    experts = discover(tiny_config("deepseek_v3", **GROUPED | overrides)).experts
    assert experts is not None
    assert experts.refusal is None
    assert (experts.groups, tuple(experts.possible)) == (groups, tuple(possible))


def test_each_group_loses_its_lowest_scores() -> None:
    """Groups lose equal numbers, also where one group has the lowest scores of all."""
    scores_E = torch.tensor([0.1, 0.3, 0.2, 9.0, 7.0, 8.0])
    assert choose_in_groups(scores_E, 4, groups=2).tolist() == [1, 2, 3, 5]
