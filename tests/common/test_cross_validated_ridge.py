"""Ridge regression of a projection: the formula, its cross-validation, and sums without a stable solution."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from llmprune.common.errors import NumericalError
from llmprune.common.linalg import cross_validated_ridge as normal_equations
from llmprune.common.linalg.cross_validated_ridge import NormalEquations, Repair, for_all_folds
from llmprune.recipe.refit import Refit


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_refit_solves_the_formula() -> None:
    """The solution minimises the ridge objective, which is solved here as one stacked least-squares problem."""
    inputs_TF, inherited_TD = _normal(50, 6), _normal(50, 3, seed=2)
    lost_TD = inputs_TF @ _normal(6, 3, seed=3) + _normal(50, 3, seed=1)
    equations = Refit(ridge=0.3).make_equations(folds=2)
    equations.update(inputs_TF[:20], lost_TD[:20], inherited_TD=inherited_TD[:20], fold=0)
    equations.update(inputs_TF[20:], lost_TD[20:], inherited_TD=inherited_TD[20:], fold=1)
    strength = (0.3 * inputs_TF.square().sum(0).mean()).sqrt()
    stacked = torch.cat([inputs_TF, strength * torch.eye(6)])
    solved = equations.solve()
    assert solved.ridge == 0.3
    wanted = torch.cat([lost_TD + solved.inherited * inherited_TD, torch.zeros(6, 3)])
    expected = torch.linalg.lstsq(stacked, wanted).solution
    torch.testing.assert_close(solved.delta_DF, expected.T, rtol=1e-4, atol=1e-5)


def _cross_validated(
    lost_TD: torch.Tensor, inherited_TD: torch.Tensor, inputs_TF: torch.Tensor, ridge: float | None = None
) -> Repair:
    equations = Refit(ridge=ridge).make_equations(folds=3)
    for fold, rows in enumerate(torch.arange(len(inputs_TF)).chunk(3)):
        equations.update(inputs_TF[rows], lost_TD[rows], inherited_TD=inherited_TD[rows], fold=fold)
    return equations.solve()


def test_refit_finds_what_the_inputs_explain() -> None:
    """An error that is linear in the inputs is removed, also on held-out tokens."""
    inputs_TF, weight_FD = _normal(300, 8), _normal(8, 4, seed=1)
    repair = _cross_validated(inputs_TF @ weight_FD, torch.zeros(300, 4), inputs_TF)
    torch.testing.assert_close(repair.delta_DF, weight_FD.T, rtol=0.05, atol=0.05)
    assert repair.held_out is not None
    assert repair.held_out < -0.99


@pytest.mark.parametrize("ridge", [None, 1e-3, 1.0])
def test_noise_is_not_fit(ridge: float | None) -> None:
    """If no solution lowers the held-out error there is none, also at a given ridge."""
    repair = _cross_validated(_normal(60, 4, seed=1), _normal(60, 4, seed=2), _normal(60, 12), ridge)
    assert repair.delta_DF is None
    assert repair.ridge is None


def test_inherited_noise_is_not_fit() -> None:
    """Inherited errors that the inputs do not explain do not disturb the rest of the solution."""
    inputs_TF, weight_FD, noise_TD = _normal(200, 12), _normal(12, 4, seed=1), 20 * _normal(200, 4, seed=2)
    repair = _cross_validated(inputs_TF @ weight_FD, noise_TD, inputs_TF)
    assert repair.inherited < 0.2
    together = Refit(ridge=0.01).make_equations(folds=1)
    together.update(inputs_TF, inputs_TF @ weight_FD, inherited_TD=noise_TD)
    naive_DF = together.solve().delta_DF
    assert repair.delta_DF is not None
    assert naive_DF is not None
    assert (repair.delta_DF - weight_FD.T).norm() < 0.6 * (naive_DF - weight_FD.T).norm()


def test_sketch_stands_for_all_outputs() -> None:
    """With more outputs than sketched ones, the held-out error is that of all outputs within a few percent."""
    inputs_TF, weight_FD = _normal(300, 8), _normal(8, 512, seed=1)
    repair = _cross_validated(inputs_TF @ weight_FD + 2 * _normal(300, 512, seed=3), torch.zeros(300, 512), inputs_TF)
    assert repair.held_out is not None
    explained = 8 / (8 + 4)  # of the squared error; noise in the solution costs a little of it
    assert -explained - 0.05 < repair.held_out < -0.8 * explained


def test_refit_of_no_error_is_nothing() -> None:
    """Without an error the weights are not changed."""
    equations = Refit().make_equations(folds=2)
    equations.update(_normal(40, 5), None, inherited_TD=torch.zeros(40, 2), fold=0)
    equations.update(_normal(40, 5, seed=1), None, inherited_TD=torch.zeros(40, 2), fold=1)
    delta_DF = equations.solve().delta_DF
    assert delta_DF is None or not delta_DF.any()


def test_parts_of_one_source_do_not_weaken_the_ridge() -> None:
    """The ridge found without half of a single source is kept for all of it; with two sources it is halved."""
    solved = [_scaled_folds((1.0, 2.0, 3.0), one_source=one_source).solve() for one_source in (False, True)]
    assert solved[0].ridge is not None
    assert solved[1].ridge == 2 * solved[0].ridge
    assert solved[1].inherited == solved[0].inherited


def test_one_window_cannot_be_held_out() -> None:
    """With a single fold the default ridge is used, and no held-out error is returned."""
    equations = Refit().make_equations(folds=1)
    equations.update(_normal(40, 5), None, inherited_TD=_normal(40, 2))
    repair = equations.solve()
    assert repair.held_out is None
    assert repair.delta_DF is not None


def test_too_few_tokens_are_an_error() -> None:
    """Fewer tokens than inputs without a ridge have no unique solution: the error names the remedy."""
    equations = Refit(ridge=0).make_equations(folds=1)
    equations.update(torch.ones(3, 5), None, inherited_TD=torch.ones(3, 2))
    with pytest.raises(NumericalError, match=r"raise refit\.ridge or calibration\.samples"):
        equations.solve()


def _scaled_folds(scales: Sequence[float], *, one_source: bool = False) -> NormalEquations:
    """Return sums of two folds of 200 tokens with inputs of these scales, and an error that they explain."""
    equations = Refit().make_equations(folds=2, one_source=one_source)
    for fold in range(2):
        inputs_TF = _normal(200, len(scales), seed=fold) * torch.tensor(scales)
        equations.update(
            inputs_TF, None, inherited_TD=_normal(200, 1, seed=9) * 0.1 + inputs_TF[:, :1] / scales[0], fold=fold
        )
    return equations


@pytest.mark.parametrize("failing", [(1.0,), (1.0, 3.0), (0.3,)])
def test_a_ridge_without_a_stable_solution_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[float, ...]
) -> None:
    """A ridge at which the matrix is not positive definite is skipped, whichever of them it is."""
    real = normal_equations._ridge
    monkeypatch.setattr(
        normal_equations, "_ridge", lambda *given, ridge: None if ridge <= max(failing) else real(*given, ridge=ridge)
    )
    repair = _scaled_folds((1.0, 2.0, 3.0)).solve("layer 3, mlp.down_proj")
    assert repair.ridge is not None
    assert repair.ridge > max(failing)
    assert repair.held_out is not None
    assert repair.held_out < 0
    assert repair.delta_DF is not None


def test_a_solve_over_all_text_that_fails_takes_a_stronger_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solve over all folds tries stronger ridges too, also with a single fold."""
    real = normal_equations._ridge
    monkeypatch.setattr(
        normal_equations, "_ridge", lambda *given, ridge: None if ridge < 3.0 else real(*given, ridge=ridge)
    )
    equations = Refit().make_equations(folds=1)
    equations.update(_normal(40, 5), None, inherited_TD=_normal(40, 2))
    assert equations.solve().ridge == 3.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("fold", [0, 1])
def test_a_refit_without_any_stable_solution_says_where(fold: int, value: float) -> None:
    """NaN or infinity in either fold fails every ridge: the error names the projection and the remedy."""
    equations = _scaled_folds((1.0, 2.0, 3.0))
    equations._sums.folds[fold].gram_FF[0, 0] = value
    with pytest.raises(NumericalError, match=r"refit of layer 3, mlp.down_proj has no stable .* any ridge up to 10"):
        equations.solve("layer 3, mlp.down_proj")


def test_folds_take_memory_that_the_plan_knows() -> None:
    """Between two and four folds are summed, also with a given ridge."""
    assert [Refit().folds(sources) for sources in (0, 1, 3, 9)] == [2, 2, 3, 4]
    assert Refit(ridge=0.1).folds(3) == 3


def test_strengths_found_with_a_fold_left_out_are_scaled_to_all_folds() -> None:
    """Ridge and odds against the inherited error shrink by (n − 1)/n, as the noise of the solution does."""
    found = Repair(None, 1.0, 0.5, -0.1)
    for_all = for_all_folds(found, 2)
    assert (for_all.ridge, for_all.inherited) == (0.5, pytest.approx(2 / 3))
    assert for_all_folds(Repair(None, 1.0, 1.0, -0.1), 4).inherited == 1.0
    assert for_all_folds(Repair(None, 1.0, 0.0, -0.1), 4) == Repair(None, 0.75, 0.0, -0.1)
    assert for_all_folds(found, 1) == found
