"""Normal equations, Cholesky factors and inverses.

Shapes: T tokens, D outputs, F inputs of a projection.
"""

from __future__ import annotations

import pytest
import torch

from llmprune.common.errors import NumericalError
from llmprune.common.linalg.cholesky import factorize, inverse, mean_diagonal
from llmprune.common.linalg.cross_validated_ridge import NormalEquations


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_factor_reads_one_triangle(upper: bool, in_place: bool) -> None:
    """The factor of either triangle is that of the whole matrix, and a matrix without a factor gives None."""
    root_FF = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    matrix_FF = root_FF @ root_FF.T + torch.eye(6)
    triangle_FF = (matrix_FF.triu() if upper else matrix_FF.tril()).clone()
    factor_FF = factorize(triangle_FF, upper=upper, in_place=in_place)
    assert factor_FF is not None
    assert (factor_FF is triangle_FF) == in_place
    half_FF = factor_FF.triu() if upper else factor_FF.tril()
    torch.testing.assert_close(half_FF.T @ half_FF if upper else half_FF @ half_FF.T, matrix_FF)
    assert factorize(-matrix_FF, upper=upper, in_place=in_place) is None


def test_an_inverse_is_damped_or_refused() -> None:
    """A singular matrix has an inverse with a shift; without one the error names the setting to raise."""
    gram_FF = torch.ones(3, 3)
    inverse_FF = inverse(gram_FF, mean_diagonal(gram_FF, 0.5), setting="some.setting")
    torch.testing.assert_close(inverse_FF @ (gram_FF + 0.5 * torch.eye(3)), torch.eye(3))
    with pytest.raises(NumericalError, match=r"matrix of 3 inputs cannot be inverted.*raise some\.setting or"):
        inverse(-gram_FF, 0.0, setting="some.setting")


def test_sums_of_targets_become_sums_of_residuals() -> None:
    """Subtracting XW₀ᵀ from the sums of Y gives the solution that the sums of Y − XW₀ᵀ give."""
    generator = torch.Generator().manual_seed(0)
    input_TF = torch.randn(600, 12, generator=generator)
    weight_DF = torch.randn(5, 12, generator=generator)
    wanted_TD = input_TF @ (weight_DF + 0.3 * torch.randn(5, 12, generator=generator)).T
    wanted_TD += torch.randn(600, 5, generator=generator)
    of_wanted, of_missing = NormalEquations(None, 2), NormalEquations(None, 2)
    for fold, rows in enumerate((slice(0, 300), slice(300, 600))):
        of_wanted.update(input_TF[rows], None, inherited_TD=wanted_TD[rows], fold=fold)
        of_missing.update(input_TF[rows], None, inherited_TD=wanted_TD[rows] - input_TF[rows] @ weight_DF.T, fold=fold)
    gram_FF = of_wanted.subtract_current_output(weight_DF)
    assert torch.allclose(gram_FF, input_TF.T @ input_TF, rtol=1e-4, atol=1e-3)
    found, expected = of_wanted.solve(), of_missing.solve()
    assert found.ridge == expected.ridge
    assert found.held_out == pytest.approx(expected.held_out, rel=1e-3)
    assert found.delta_DF is not None
    assert expected.delta_DF is not None
    assert torch.allclose(found.delta_DF, expected.delta_DF, rtol=1e-2, atol=1e-4)
