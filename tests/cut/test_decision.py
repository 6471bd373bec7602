"""Choice of layers and neurons from scores, and the cut as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmprune.common.errors import RecipeError
from llmprune.cut.decision import Cut, choose_highest, choose_layers, gap_after, kept_share
from llmprune.score.scores import Scores


def test_layers_with_the_lowest_scores_are_removed() -> None:
    """Kept layers are in order; of equal scores the earlier layer is kept."""
    assert choose_layers(torch.tensor([0.5, 0.1, 0.9, 0.2]), 2) == (0, 2)
    assert choose_layers(torch.tensor([1.0, 1.0, 1.0]), 2) == (0, 1)


def test_one_of_the_needed_layers_is_kept() -> None:
    """A hybrid keeps its best full-attention layer instead of the worst layer that was kept."""
    assert choose_layers(torch.tensor([0.9, 0.1, 0.8, 0.2]), 2, one_of=(1, 3)) == (0, 3)
    assert choose_layers(torch.tensor([0.9, 0.7, 0.8, 0.2]), 2, one_of=(0, 3)) == (0, 2)


def test_neurons_with_the_highest_scores_are_kept() -> None:
    """Indices ascend, and ``kept_share`` is their share of the total score."""
    scores = Scores(None, {"0.mlp": torch.tensor([3.0, 1.0, 4.0, 2.0])})
    kept = choose_highest(scores.neurons["0.mlp"], 2)
    assert kept.tolist() == [0, 2]
    assert kept_share(scores.neurons["0.mlp"], kept) == pytest.approx(0.7)
    assert kept_share(scores.neurons["0.mlp"], kept, is_additive=False) == pytest.approx(1 - 2 / 4)


def test_cut_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    """A cut read back from JSON and safetensors is the same."""
    neurons = {"0.mlp": torch.tensor([1, 3]), "3.mlp.experts": torch.tensor([[0, 2], [1, 2]])}
    experts, heads = {"3.mlp.experts": torch.tensor([1])}, {"0.attention": torch.tensor([0, 2])}
    cut = Cut(4, (0, 1, 3), {"width": 2}, neurons, 1, experts, 2, heads)
    cut.save(tmp_path / "cut.json")
    loaded = Cut.load(tmp_path / "cut.json")
    assert (loaded.layers, loaded.removed, loaded.widths, loaded.num_experts) == ((0, 1, 3), (2,), {"width": 2}, 1)
    assert loaded.kv_groups == 2
    for before, after in ((neurons, loaded.neurons), (experts, loaded.experts), (heads, loaded.heads)):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_cut_of_other_sizes_than_the_recipe_says_is_refused() -> None:
    """Layers may be edited by hand; the number of heads is the recipe's."""
    heads = {"0.attention": torch.tensor([0, 2])}
    chosen = Cut(4, (0, 1, 2, 3), kv_groups=2, heads=heads)
    chosen.require_like(Cut(4, (0, 1, 3), kv_groups=2, heads=heads))
    with pytest.raises(RecipeError, match=r"kv_groups 1, and the recipe keeps .* kv_groups 2"):
        Cut(4, (0, 1, 2, 3), kv_groups=1, heads={"0.attention": torch.tensor([0])}).require_like(chosen)


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (0, 4), (-1, 0)])
def test_impossible_cuts_are_refused(layers: tuple[int, ...]) -> None:
    """No layer, layers out of order, twice, or beyond the model's."""
    with pytest.raises(RecipeError, match="keeps at least one of layers 0 to 3"):
        Cut(4, layers)


def test_gap_is_the_removed_layers_between_kept_ones() -> None:
    """A gap ends at the next kept layer or at the end of the model."""
    assert [list(gap_after((1, 2, 5), position, num_layers=7)) for position in range(3)] == [[], [3, 4], [6]]
