"""Equations of a projection that lost inputs: the contribution of these follows from their products with the others."""

from __future__ import annotations

import pytest
import torch

from llmprune.common.linalg.cut_equations import CutTokens
from llmprune.recipe.refit import Refit

TOKENS, KEPT, REMOVED, HIDDEN = 400, 12, 5, 8


@pytest.mark.parametrize("has_gap", [False, True])
@pytest.mark.parametrize("removed", [0, REMOVED])
def test_the_solution_is_that_of_both_parts_of_the_error(removed: int, has_gap: bool) -> None:
    """The same strength, the same fraction of the inherited error and the same change as with parts of each token."""
    generator = torch.Generator().manual_seed(0)
    mixed_TF = torch.randn(TOKENS, 9, generator=generator) @ torch.randn(9, KEPT + removed, generator=generator)
    mixed_TF += 0.3 * torch.randn(TOKENS, KEPT + removed, generator=generator)
    kept_TK, removed_TR = mixed_TF[:, :KEPT], mixed_TF[:, KEPT:]
    removed_RD = torch.randn(removed, HIDDEN, generator=generator)
    gap_TD = (mixed_TF[:, :HIDDEN] + 1).tanh() if has_gap else torch.zeros(TOKENS, HIDDEN)
    lost_TD = removed_TR @ removed_RD + gap_TD
    inherited_TD = torch.randn(TOKENS, HIDDEN, generator=generator) + kept_TK[:, :HIDDEN]
    whole, cut = Refit().make_equations(2), Refit().make_cut_equations(2, removed_RD=removed_RD)
    for batch, rows in enumerate(torch.arange(TOKENS).split(100)):
        whole.update(kept_TK[rows], lost_TD[rows], inherited_TD=inherited_TD[rows], fold=batch % 2)
        error_TD, gap = lost_TD[rows] + inherited_TD[rows], gap_TD[rows] if has_gap else None
        cut.update_cut(CutTokens(kept_TK[rows], removed_TR[rows], error_TD, gap), fold=batch % 2)
    wanted, found = whole.solve(), cut.solve()
    assert (wanted.ridge, wanted.delta_DF is None) == (found.ridge, False)
    assert found.inherited == pytest.approx(wanted.inherited, rel=1e-3)
    assert found.held_out == pytest.approx(wanted.held_out, rel=1e-3)
    torch.testing.assert_close(found.delta_DF, wanted.delta_DF, rtol=1e-3, atol=1e-4)


def test_without_an_inherited_error_none_is_corrected() -> None:
    """Where the removed inputs cause the whole error, what rounding leaves of an inherited one is left out."""
    generator = torch.Generator().manual_seed(0)
    kept_TK = torch.randn(TOKENS, KEPT, generator=generator)
    removed_TR = kept_TK[:, :REMOVED] + 0.1 * torch.randn(TOKENS, REMOVED, generator=generator)
    removed_RD = torch.randn(REMOVED, HIDDEN, generator=generator)
    equations = Refit().make_cut_equations(2, removed_RD=removed_RD)
    for fold, rows in enumerate(torch.arange(TOKENS).chunk(2)):
        tokens = CutTokens(kept_TK[rows], removed_TR[rows], removed_TR[rows] @ removed_RD, None)
        equations.update_cut(tokens, fold=fold)
    repair = equations.solve()
    assert repair.inherited == 0
    assert repair.delta_DF is not None
