"""Steps of pass 2: what is decided of each kept layer before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.cut.decision import Cut
from llmprune.prune.layer_step import LayerStep, steps_of
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.testing import tiny_model

SPARSE = Sparsity.model_validate({"pattern": 0.5})
WANDA = Sparsity.model_validate({"pattern": 0.5, "method": {"kind": "wanda"}})


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """Anatomy of a Llama of four layers."""
    return discover(tiny_model("llama").config)


def _steps(cut: Cut, anatomy: Anatomy, **settings: Any) -> tuple[LayerStep, ...]:
    return steps_of(cut, anatomy, **({"refit": Refit(), "sparsity": None} | settings))


def _narrowed(anatomy: Anatomy, *layers: int) -> Cut:
    neurons = {unit_key(index, anatomy.units[index][0].path): torch.arange(64) for index in layers}
    return Cut(4, (0, 1, 2, 3), {"intermediate_size": 64}, neurons)


def test_each_kept_layer_has_a_step_with_its_gap(anatomy: Anatomy) -> None:
    """Indices before and after the cut, and the removed layers up to the next kept one."""
    steps = _steps(Cut(4, (0, 3)), anatomy)
    assert [(step.new, step.old, list(step.gap)) for step in steps] == [(0, 0, [1, 2]), (1, 3, [])]


def test_layers_before_the_first_change_are_untouched(anatomy: Anatomy) -> None:
    """A layer is touched by its own cut, by an earlier one, and by a gap right after it; sparsity touches all."""
    assert [step.is_untouched for step in _steps(Cut(4, (0, 1, 3)), anatomy)] == [True, False, False]
    assert [step.is_untouched for step in _steps(_narrowed(anatomy, 2, 3), anatomy)] == [True, True, False, False]
    assert not any(step.is_untouched for step in _steps(Cut(4, (0, 1, 2, 3)), anatomy, sparsity=SPARSE))


def test_token_mixers_are_refit_after_a_gap_and_where_heads_are_removed(anatomy: Anatomy) -> None:
    """A layer moves to a lower index only after removed ones."""
    assert [step.refits_mixer for step in _steps(Cut(4, (0, 2, 3)), anatomy)] == [False, True, True]
    attention = anatomy.attention[1]
    assert attention is not None
    heads = {unit_key(1, attention.path): torch.tensor([0])}
    steps = _steps(Cut(4, (0, 1, 2, 3), kv_groups=1, heads=heads), anatomy)
    assert [step.attention is not None for step in steps] == [False, True, False, False]
    assert [step.refits_mixer for step in steps] == [False, True, False, False]


def test_only_what_the_cut_narrows_is_narrowed(anatomy: Anatomy) -> None:
    """``cuts_only`` tells a layer that loses neurons of one unit from one that loses heads too."""
    step = _steps(_narrowed(anatomy, 1), anatomy)[1]
    unit, attention = anatomy.units[1][0], anatomy.attention[1]
    assert attention is not None
    assert step.narrows(unit)
    assert step.cuts_only(unit)
    assert not step.cuts_only(attention)


def test_without_a_refit_nothing_is_refit(anatomy: Anatomy) -> None:
    """The error against the dense hidden states is measured all the same."""
    for step in _steps(Cut(4, (0, 2, 3)), anatomy, refit=None):
        assert step.uses_dense
        assert (step.mlp, step.is_refit, step.refits_output, step.needs_topology) == (None, False, False, False)


def test_sparse_matrices_are_refit_as_their_method_allows(anatomy: Anatomy) -> None:
    """A method with a refit solves the output projections itself; Wanda alone needs no dense hidden states."""
    whole = Cut(4, (0, 1, 2, 3))
    assert all(step.refits_sparse and step.uses_dense for step in _steps(whole, anatomy, sparsity=SPARSE))
    assert not any(step.refits_output for step in _steps(whole, anatomy, sparsity=SPARSE))
    assert not any(step.uses_dense or step.is_refit for step in _steps(whole, anatomy, sparsity=WANDA))
    assert all(step.refits_output for step in _steps(Cut(4, (0, 1, 2)), anatomy, sparsity=WANDA))


@pytest.mark.parametrize("up", [False, True])
def test_sparse_layers_refit_mixers_for_the_up_projection_alone(anatomy: Anatomy, up: bool) -> None:
    """Their output projections are refit afterwards anyway."""
    steps = _steps(Cut(4, (0, 2, 3)), anatomy, refit=Refit(up=up), sparsity=SPARSE)
    assert [step.refits_mixer for step in steps] == [False, up, up]
