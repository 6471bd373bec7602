"""A new criterion or sparsity method is one class: recipes, plan, run and reference know it without another change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from generate.recipe import recipe_reference
from helpers.commands import verify_here
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune import Recipe, run
from llmprune.common.errors import RecipeError
from llmprune.common.variants import Variant
from llmprune.criteria.accumulators.base import ExpertAccumulator, LayerAccumulator, UnitAccumulator
from llmprune.criteria.base import DepthCriterion, ExpertCriterion, HiddenStateCriterion, WidthCriterion
from llmprune.cut.decision import Cut
from llmprune.recipe.depth import Depth
from llmprune.recipe.experts import Experts
from llmprune.recipe.sparsity import Sparsity
from llmprune.recipe.width import Width
from llmprune.sparsity.method import InputMoments, SparsityMethod
from llmprune.sparsity.pattern import Pattern
from llmprune.testing import tiny_model

FAMILIES: tuple[type[Variant], ...] = (DepthCriterion, WidthCriterion, ExpertCriterion, SparsityMethod)


@pytest.fixture
def read_again() -> Iterator[Callable[[], None]]:
    """Let recipes, which earlier tests have read already, accept kinds defined since; forget these after the test."""
    before = {family: dict(family.registry) for family in FAMILIES}

    def build() -> None:
        for section in (Depth, Width, Experts, Sparsity, Recipe):
            section.model_rebuild(force=True)

    yield build
    for family, kinds in before.items():
        family.registry.clear()
        family.registry.update(kinds)
    build()


class GivenScores(LayerAccumulator, UnitAccumulator, ExpertAccumulator):
    """Scores that are given beforehand, whatever the text."""

    def __init__(self, score: float = 0.0, scores: Tensor | None = None) -> None:
        self._score, self._scores = score, scores

    def reducible_state(self) -> list[Tensor]:
        """Return no sums."""
        return []

    def update(self, *_: object) -> None:
        """Ignore the text."""

    def score(self) -> Tensor:
        """Return the score of the layer."""
        return torch.tensor(self._score)

    def scores(self) -> Tensor:
        """Return the scores of the neurons or experts."""
        assert self._scores is not None
        return self._scores


def define_kinds() -> None:
    """Define one kind of each family; this is all that a new file holds."""
    layers = itertools.count()

    class FirstLayers(HiddenStateCriterion):
        """Removes the first layers."""

        kind: Literal["first_layers"] = "first_layers"

        def make_accumulator(self, device: torch.device) -> LayerAccumulator:
            return GivenScores(float(next(layers)))

    class FirstNeurons(WidthCriterion):
        """Removes the first neurons."""

        kind: Literal["first_neurons"] = "first_neurons"

        def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
            return GivenScores(scores=torch.arange(1.0, output_DF.shape[1] + 1))

    class FirstExperts(ExpertCriterion):
        """Removes the first experts."""

        kind: Literal["first_experts"] = "first_experts"

        def make_accumulator(self, experts: int, device: torch.device) -> ExpertAccumulator:
            return GivenScores(scores=torch.arange(float(experts)))

    class FirstWeights(SparsityMethod):
        """Keeps the first weights of each group."""

        requires: ClassVar[InputMoments] = "nothing"
        refits_by_default: ClassVar[bool] = False

        kind: Literal["first_weights"] = "first_weights"

        def prune(self, weight_OI: Tensor, moments: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
            mask_OI = pattern.mask(-torch.arange(weight_OI.shape[1]).float().expand_as(weight_OI))
            return weight_OI * mask_OI, mask_OI


def recipe_text(folder: Path) -> str:
    """A recipe that uses all four."""
    return f"""
model: {{id: '{folder}/base'}}
calibration: {{tokens: '{folder}/ids.safetensors', key: input_ids, samples: 4, sequence_length: 24}}
evaluation: {{perplexity: null}}
refit: false
depth: {{remove: 1, criterion: {{kind: first_layers}}}}
width: {{mlp: 0.5, criterion: {{kind: first_neurons}}}}
experts: {{remove: 1, criterion: {{kind: first_experts}}}}
sparsity: {{pattern: "1:2", method: {{kind: first_weights}}, targets: [o_proj]}}
"""


def test_a_kind_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_again: Callable[[], None]) -> None:
    """A depth, a width and an expert criterion and a sparsity method that no file names decide a run."""
    verify_here(monkeypatch)
    model = tiny_model("mixtral", num_hidden_layers=3)
    model.save_pretrained(tmp_path / "base")
    save_file({"input_ids": torch.randint(3, 64, (4, 24))}, tmp_path / "ids.safetensors")
    with pytest.raises(RecipeError, match=r"must be .*, not 'first_layers'"):
        Recipe.parse(recipe_text(tmp_path))
    define_kinds()
    read_again()
    run(Recipe.parse(recipe_text(tmp_path)), tmp_path / "run")

    cut = Cut.load(tmp_path / "run" / "cut.json")
    assert cut.removed == (0,)
    (kept,), neurons = cut.widths.values(), model.config.intermediate_size
    for kept_EK in cut.neurons.values():
        assert kept_EK.tolist() == [list(range(neurons - kept, neurons))] * model.config.num_local_experts
    assert {tuple(kept_E.tolist()) for kept_E in cut.experts.values()} == {(1, 2, 3)}
    pruned = load_file(next((tmp_path / "run" / "model").glob("*.safetensors")))
    for name, weight_OI in pruned.items():
        if name.endswith("o_proj.weight"):
            assert (weight_OI.unflatten(1, (-1, 2)) != 0).flatten(0, 1).all(0).tolist() == [True, False]


def test_messages_and_reference_name_a_new_kind(read_again: Callable[[], None]) -> None:
    """A misspelt name is answered with it, and the reference of recipes lists it."""
    define_kinds()
    read_again()
    for section, key in (
        ("depth: {remove: 1", "layers"),
        ("width: {mlp: 0.5", "neurons"),
        ("experts: {keep: 1", "experts"),
    ):
        text = f"model: {{id: x}}\ncalibration: {{dataset: x}}\n{section}, criterion: {{kind: frst_{key}}}}}\n"
        with pytest.raises(RecipeError, match=rf"did you mean 'first_{key}'\?"):
            Recipe.parse(text)
    assert all(f"{{kind: {kind}}}" in recipe_reference() for kind in ("first_layers", "first_neurons", "first_weights"))


def test_a_kind_is_not_defined_twice(read_again: Callable[[], None]) -> None:
    """Two classes of one name would hide each other."""
    define_kinds()
    with pytest.raises(AssertionError, match="has the kind first_layers already"):
        define_kinds()
