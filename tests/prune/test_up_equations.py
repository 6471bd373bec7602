"""Least squares for an up projection: what is explained is found, and noise is not fit."""

from __future__ import annotations

import pytest
import torch

from llmprune.common.errors import NumericalError
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.prune.repair.folds import every_eighth
from llmprune.prune.repair.up_equations import UpEquations, UpRepair

WINDOWS, LENGTH, INPUTS, NEURONS, HIDDEN = 16, 24, 6, 8, 5


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _writes(up_FI: torch.Tensor) -> torch.Tensor:
    """Return what a change of the up projection adds to the output [N, L, D] of the MLP in ``_solve``."""
    return ((_inputs() @ up_FI.T) * _gates()) @ _down().T


def _inputs() -> torch.Tensor:
    return _normal(WINDOWS, LENGTH, INPUTS, seed=1) * torch.tensor([3.0, 1, 1, 1, 0.5, 0.1])


def _gates() -> torch.Tensor:
    return torch.nn.functional.silu(_normal(WINDOWS, LENGTH, NEURONS, seed=2))


def _down() -> torch.Tensor:
    return _normal(HIDDEN, NEURONS, seed=3)


def _solve(missing_NLD: torch.Tensor, batch_size: int = 4, wanted_NLD: torch.Tensor | None = None) -> UpRepair:
    windows = len(missing_NLD)
    wanted_NLD = torch.ones_like(missing_NLD) if wanted_NLD is None else wanted_NLD
    allocate = lambda _: HiddenStates()  # noqa: E731  # as a layer-wise forward pass does
    equations = UpEquations(_down(), WindowGroups(every_eighth(windows), batch_size), allocate=allocate)
    for rows in torch.split(torch.arange(windows), batch_size):
        equations.update(
            _inputs()[rows], _gates()[rows], missing_BLD=missing_NLD[rows].clone(), target_BLD=wanted_NLD[rows]
        )
    return equations.solve()


def test_a_change_that_the_up_projection_explains_is_found() -> None:
    """A residual that a change of the up projection explains is reduced as far as the ridge allows, also held out."""
    wanted_FI = _normal(NEURONS, INPUTS, seed=4)
    missing_NLD = _writes(wanted_FI)
    repair = _solve(missing_NLD)
    assert repair.delta_FI is not None
    assert repair.held_out is not None
    left_NLD = missing_NLD - _writes(repair.delta_FI)
    held_out_N = every_eighth(WINDOWS).bool()
    for windows_N in (held_out_N, ~held_out_N):
        assert left_NLD[windows_N].square().sum() < 0.6 * missing_NLD[windows_N].square().sum()
    change = left_NLD[held_out_N].square().sum() / missing_NLD[held_out_N].square().sum() - 1
    assert repair.held_out == pytest.approx(float(change), abs=1e-4)


def test_batches_of_any_size_solve_the_same() -> None:
    """The solution does not depend on how windows are batched."""
    missing_NLD = _writes(_normal(NEURONS, INPUTS, seed=4)) + _normal(WINDOWS, LENGTH, HIDDEN, seed=5)
    first, second = _solve(missing_NLD, 3), _solve(missing_NLD, 16)
    assert first.held_out == pytest.approx(second.held_out, abs=1e-4)
    assert first.delta_FI is not None
    assert second.delta_FI is not None
    torch.testing.assert_close(first.delta_FI, second.delta_FI, rtol=1e-3, atol=1e-5)


def test_tokens_weigh_equally() -> None:
    """A token with a thousand times larger hidden states and error weighs no more than another; one with a target of
    zero does no harm.
    """
    missing_NLD = _writes(_normal(NEURONS, INPUTS, seed=4))
    loud_NLD, wanted_NLD = missing_NLD.clone(), torch.ones_like(missing_NLD)
    plain = _solve(missing_NLD)
    loud_NLD[:, 0] = 1000 * _normal(WINDOWS, HIDDEN, seed=6)
    wanted_NLD[:, 0] = 1000
    wanted_NLD[:, 1] = 0
    loud = _solve(loud_NLD, wanted_NLD=wanted_NLD)
    assert plain.delta_FI is not None
    assert loud.delta_FI is not None
    apart = (loud.delta_FI - plain.delta_FI).norm() / plain.delta_FI.norm()
    assert apart < 0.3
    assert _solve(loud_NLD).held_out == pytest.approx(0, abs=0.05)  # unnormalised it dominates the others


def test_noise_is_not_fit() -> None:
    """A step that raises the error of held-out windows is not taken, however much it lowers the others'."""
    for seed in range(5):
        missing_NLD = _normal(WINDOWS, LENGTH, HIDDEN, seed=10 + seed)
        repair = _solve(missing_NLD)
        assert repair.held_out is not None
        assert repair.held_out <= 0
        assert repair.held_out > -0.05


def test_nothing_to_learn_from() -> None:
    """Without a held-out window, or without a residual, there is no repair."""
    assert _solve(_normal(1, LENGTH, HIDDEN)) == UpRepair(None, None)
    assert _solve(torch.zeros(WINDOWS, LENGTH, HIDDEN)) == UpRepair(None, None)


def test_inputs_that_are_not_finite_are_refused() -> None:
    """The error names the setting to change."""
    allocate = lambda _: HiddenStates()  # noqa: E731  # as a layer-wise forward pass does
    equations = UpEquations(_down(), WindowGroups(every_eighth(8), 8), allocate=allocate)
    missing_NLD = _normal(8, LENGTH, HIDDEN)
    equations.update(_inputs()[:8] * torch.inf, _gates()[:8], missing_BLD=missing_NLD, target_BLD=missing_NLD)
    with pytest.raises(NumericalError, match=r"refit\.up to false"):
        equations.solve()
