"""Formulas of the single width criteria.

Shapes: T tokens, B batch, L sequence length, D hidden size, F neurons.

"""

from __future__ import annotations

import pytest
import torch
from helpers.unit import HIDDEN, LENGTH, NEURONS, WINDOWS, Unit, normal

from llmprune.criteria.width.flap import Flap
from llmprune.criteria.width.magnitude import Magnitude
from llmprune.criteria.width.share import Share
from llmprune.criteria.width.taylor import Taylor
from llmprune.criteria.width.wanda import Wanda


def test_magnitude_is_the_norm_of_all_weights_of_a_neuron() -> None:
    """The norm covers rows of gate and up, the bias and the output column."""
    unit = Unit()
    together_FI = torch.cat([*(rows.reshape(NEURONS, -1) for rows in unit.inputs), unit.output_DF.T], dim=1)
    torch.testing.assert_close(unit.scores(Magnitude()), together_FI.norm(dim=1))


def test_wanda_adds_up_the_importance_of_single_weights() -> None:
    """|w_df| times the root of the mean square of x_f, summed over d."""
    unit = Unit()
    activation_TF = unit.activation_BLF.flatten(0, 1)
    single_DF = unit.output_DF.abs() * activation_TF.square().mean(0).sqrt()
    torch.testing.assert_close(unit.scores(Wanda()), single_DF.sum(0))


def test_share_is_what_a_neuron_writes_of_what_its_token_gets() -> None:
    """Squared norms times the cosine, averaged over tokens; the energy of a token makes no difference."""
    unit = Unit()
    activation_TF = unit.activation_BLF.flatten(0, 1)
    written_TDF = activation_TF[:, None, :] * unit.output_DF
    all_TD1 = written_TDF.sum(2, keepdim=True)
    cosine_TF = torch.cosine_similarity(written_TDF, all_TD1, dim=1).abs()
    wanted_F = (written_TDF.square().sum(1) / all_TD1.square().sum(1) * cosine_TF).mean(0)
    torch.testing.assert_close(unit.scores(Share()), wanted_F)
    unit.activation_BLF[3] *= 1000
    torch.testing.assert_close(unit.scores(Share()), wanted_F)


def test_tokens_that_get_nothing_give_no_share() -> None:
    """Tokens with zero output count as tokens, with zero scores instead of 0 / 0."""
    unit = Unit()
    whole_F = unit.scores(Share())
    unit.activation_BLF[: WINDOWS // 2] = 0
    unit.activation_BLF[WINDOWS // 2 :] = Unit().activation_BLF[: WINDOWS // 2]
    half_F = unit.accumulate(Share(), slice(WINDOWS // 2, None)).scores()
    assert torch.isfinite(whole_F).all()
    torch.testing.assert_close(unit.scores(Share()), half_F / 2)


def test_share_computes_the_angles_of_some_of_many_tokens() -> None:
    """Every n-th token's are enough for nearly the same scores, whatever the batches; the energy is that of all."""
    unit, tokens = Unit(), 16 * 2048
    values_TF = normal(tokens, NEURONS) * torch.linspace(0.1, 3, NEURONS)
    written_TD = values_TF @ unit.output_DF.T

    def scored(criterion: Share, batch: int) -> torch.Tensor:
        accumulator = criterion.make_accumulator(unit.output_DF)
        for values_SF, written_SD in zip(values_TF.split(batch), written_TD.split(batch), strict=True):
            accumulator.update_with(values_SF, written_SD)
        return accumulator.scores()

    some = Share().for_tokens(tokens)
    assert some.token_operations(96, 32) == Share().token_operations(96, 32) / 16
    torch.testing.assert_close(scored(some, 1000), scored(Share(), 1000), rtol=0.1, atol=0)
    torch.testing.assert_close(scored(some, 1000), scored(some, 333), rtol=1e-4, atol=0)
    assert torch.equal(scored(Share().for_tokens(4095), 333), scored(Share(), 333)), "few tokens: all are taken"


def test_a_neuron_that_is_nearly_inactive_where_angles_are_computed_gets_the_mean_angle() -> None:
    """The few values there would be scaled beyond float32."""
    unit, tokens = Unit(), 2 * 2048
    values_TF = normal(tokens, NEURONS)
    values_TF[::2, 0] = 1e-20
    accumulator = Share().for_tokens(tokens).make_accumulator(unit.output_DF)
    accumulator.update_with(values_TF, values_TF @ unit.output_DF.T)
    whole = Share().make_accumulator(unit.output_DF)
    whole.update(values_TF)
    torch.testing.assert_close(accumulator.scores(), whole.scores(), rtol=0.3, atol=0)


def test_flap_is_the_variance_of_what_a_neuron_writes() -> None:
    """Variance over all tokens of the neuron's contribution, summed over outputs."""
    unit = Unit()
    written_TDF = unit.activation_BLF.flatten(0, 1)[:, None, :] * unit.output_DF
    torch.testing.assert_close(unit.scores(Flap()), written_TDF.var(0, correction=0).sum(0))


def test_flap_sees_a_small_variance_beside_a_large_mean() -> None:
    """The variance is exact for a mean of a thousand deviations and batches of different means."""
    values_TF = 1000 + normal(4096, 3)
    values_TF[2048:] += 2
    accumulator = Flap().make_accumulator(torch.ones(1, 3))
    for part_TF in values_TF.split(100):
        accumulator.update(part_TF)
    torch.testing.assert_close(accumulator.scores(), values_TF.double().var(0, correction=0).float())


@pytest.mark.parametrize("absolute", ["token", "window", "all"])
def test_taylor_drops_signs_where_it_says(absolute: str) -> None:
    """Loss changes cancel out within tokens, windows or the whole text, as ``absolute`` says."""
    effect_BLF = normal(WINDOWS, LENGTH, NEURONS)
    accumulator = Taylor.model_validate({"absolute": absolute}).make_accumulator(torch.ones(HIDDEN, NEURONS))
    for part in effect_BLF.split(4):
        accumulator.update(part)
    wanted_F = {
        "token": effect_BLF.abs().sum((0, 1)),
        "window": effect_BLF.sum(1).abs().sum(0),
        "all": effect_BLF.sum((0, 1)).abs(),
    }[absolute]
    torch.testing.assert_close(accumulator.scores(), wanted_F / (WINDOWS * LENGTH))
