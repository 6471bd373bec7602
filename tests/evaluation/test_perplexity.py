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
from llmprune.evaluation import perplexity as measured
from llmprune.evaluation.perplexity import ComparedPredictions, compare_predictions, perplexity
from llmprune.layerwise import logits
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
    expected = kl_divergence(dense, other)
    for criterion in (Divergence(), Residual()):
        assert torch.equal(
            criterion.token_costs(other, dense, targets_BP=torch.zeros(3, 5, dtype=torch.int64)), expected
        )


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
    original = LayerwiseForward.logits_of
    ids, masked = windows() % 32, torch.zeros(VOCABULARY)
    masked[32:] = -math.inf
    monkeypatch.setattr(LayerwiseForward, "logits_of", lambda *args, **kwargs: original(*args, **kwargs) + masked)
    compared = compare_predictions(decoder, decoder, windows_NL=ids, batch_size=2)
    assert (compared.divergence.mean, compared.divergence.same_first) == (0.0, 1.0)
    assert math.isfinite(compared.dense_perplexity)
    assert compared.dense_perplexity == compared.pruned_perplexity
    assert perplexity(decoder, ids + 32, batch_size=2, name="alone") == math.inf


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_processes_share_the_batches(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, the last without a window where there is one batch, give one process's figures to the bit."""
    decoders = dense_decoder(tiny_model("llama")), dense_decoder(tiny_model("llama", seed=1))

    def compare() -> ComparedPredictions:
        return compare_predictions(*decoders, windows_NL=windows(), batch_size=batch_size)

    alone, sums = compare(), dict[int, list[torch.Tensor]]()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for process in range(3):
        monkeypatch.setenv("RANK", str(process))
        monkeypatch.setattr(
            measured, "sum_over_processes", lambda parts, process=process: sums.setdefault(process, []).extend(parts)
        )
        compare()
    totals = iter([torch.stack(parts).sum(0) for parts in zip(*sums.values(), strict=True)])
    monkeypatch.setattr(measured, "sum_over_processes", lambda parts: [part.copy_(next(totals)) for part in parts])
    assert compare() == alone


def test_figures_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary's logits are computed for some tokens at a time, with the same figures."""
    dense, pruned = dense_decoder(tiny_model("llama")), dense_decoder(tiny_model("llama", seed=1))
    whole = compare_predictions(dense, pruned, windows_NL=windows(), batch_size=2)
    monkeypatch.setattr(logits, "MAX_LOGITS", 7 * VOCABULARY)
    chunks = compare_predictions(dense, pruned, windows_NL=windows(), batch_size=2)
    assert chunks.dense_perplexity == pytest.approx(whole.dense_perplexity, rel=1e-6)
    assert chunks.pruned_perplexity == pytest.approx(whole.pruned_perplexity, rel=1e-6)
    assert chunks.divergence.mean == pytest.approx(whole.divergence.mean, rel=1e-5)
    assert chunks.divergence.same_first == whole.divergence.same_first


def test_a_begin_of_text_token_is_no_target() -> None:
    """Predictions of a begin-of-text token inside a window count in no figure; the token after it does."""
    dense, pruned = tiny_model("llama"), tiny_model("llama", seed=1)
    decoders, ids_NL, begin = (dense_decoder(dense), dense_decoder(pruned)), windows() % 32 + 8, 3
    ids_NL[:, 0] = begin
    ids_NL[:3, 10] = begin
    counted = (ids_NL[:, 1:] != begin).flatten()
    log_p, log_q = (model(ids_NL).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (dense, pruned))
    losses = torch.nn.functional.nll_loss(log_p, ids_NL[:, 1:].flatten(), reduction="none")[counted]
    every = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[counted]
    found = compare_predictions(*decoders, windows_NL=ids_NL, batch_size=2, begin=(begin,))
    assert found.dense_perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found.dense_perplexity == perplexity(decoders[0], ids_NL, batch_size=2, name="dense", begin=(begin,))
    assert found.divergence.mean == pytest.approx(float(every.mean()), rel=1e-4)
    assert found.divergence.tokens == 5 * 23 - 3
