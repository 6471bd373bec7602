"""Perplexity and divergence on held-out text."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.random_inputs import logits_of, windows

from llmprune.common.errors import NumericalError
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.residual import Residual
from llmprune.evaluation.perplexity import compare_predictions, perplexity
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.testing import VOCABULARY, tiny_model


def test_a_model_does_not_diverge_from_itself() -> None:
    """The same model twice: zero divergence, the same first tokens, one perplexity."""
    decoder = dense_decoder(tiny_model("llama"))
    compared = compare_predictions(decoder, decoder, windows_NL=windows(), batch_size=2)
    alone = perplexity(decoder, windows(), batch_size=2, name="alone")
    assert compared.dense_perplexity == compared.pruned_perplexity == alone
    figures = compared.divergence
    assert (figures.mean, figures.same_first, figures.tokens) == (0.0, 1.0, 5 * 23)
    assert set(figures.quantiles.values()) == {0.0}


def test_divergence_is_that_of_the_distributions() -> None:
    """Mean and quantiles are those of KL(dense ‖ pruned) over every next token, as torch computes it in one piece."""
    dense, pruned = tiny_model("llama"), tiny_model("llama", seed=1)
    decoders = dense_decoder(dense), dense_decoder(pruned)
    figures = compare_predictions(*decoders, windows_NL=windows(), batch_size=2).divergence
    log_p, log_q = (model(windows()).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (dense, pruned))
    every = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert figures.mean == pytest.approx(float(every.mean()), rel=1e-4)
    assert figures.quantiles["1.0"] == pytest.approx(float(every.max()), rel=1e-4)
    assert figures.quantiles["0.5"] == pytest.approx(float(every.sort().values[57]), rel=1e-4)
    assert figures.same_first == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def test_the_criteria_and_the_held_out_text_agree() -> None:
    """Both depth criteria compute the divergence of the evaluation, masked entries included."""
    dense, other = logits_of(0, slice(60, 64)), logits_of(1, slice(60, 64))
    expected = kl_divergence(dense[:, :-1], other[:, :-1])
    for criterion in (Divergence(), Residual()):
        assert torch.equal(criterion.token_costs(other, dense, ids_BL=torch.zeros(3, 5, dtype=torch.int64)), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_the_evaluation(value: float) -> None:
    """The error names the model: dense, cut or pruned."""
    right, broken = (dense_decoder(tiny_model("llama", tie_word_embeddings=False)) for _ in range(2))
    with torch.no_grad():
        broken.skeleton.lm_head.weight[5] = value
    for models, what in (((broken, right), "dense"), ((right, broken), "pruned")):
        with pytest.raises(NumericalError, match=f"held-out text, {what} model: its logits are NaN or infinite"):
            compare_predictions(*models, windows_NL=windows(), batch_size=2)
    with pytest.raises(NumericalError, match="held-out text, cut model"):
        perplexity(broken, windows(), batch_size=2, name="cut")


def test_tokens_that_a_model_masks_are_infinitely_perplexing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary entry at −inf is not an error, and does not affect other tokens."""
    decoder = dense_decoder(tiny_model("llama"))
    original = LayerwiseForward.logits
    ids, masked = windows() % 32, torch.zeros(VOCABULARY)
    masked[32:] = -math.inf
    monkeypatch.setattr(LayerwiseForward, "logits", lambda forward, batch: original(forward, batch) + masked)
    compared = compare_predictions(decoder, decoder, windows_NL=ids, batch_size=2)
    assert (compared.divergence.mean, compared.divergence.same_first) == (0.0, 1.0)
    assert math.isfinite(compared.dense_perplexity)
    assert compared.dense_perplexity == compared.pruned_perplexity
    assert perplexity(decoder, ids + 32, batch_size=2, name="alone") == math.inf
