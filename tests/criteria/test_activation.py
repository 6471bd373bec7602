"""Activation: the energy that a neuron writes."""

from __future__ import annotations

import torch

from llmprune.criteria.width.activation import Activation


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_activation_score_is_the_energy_that_a_neuron_writes() -> None:
    """Mean square of the activation times the squared norm of the neuron's output column."""
    weight_DF, activation_BLF = _normal(3, 5), _normal(2, 7, 5, seed=1)
    accumulator = Activation().make_accumulator(weight_DF)
    accumulator.update(activation_BLF[:1])
    accumulator.update(activation_BLF[1:])
    written = activation_BLF.flatten(0, 1)[:, None, :] * weight_DF  # [T, D, F]
    torch.testing.assert_close(accumulator.scores(), written.square().sum(1).mean(0))
