"""What is measured beside tasks: divergence, free generation, a bench, on models that run in milliseconds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer

from llmprune.errors import RecipeError
from llmprune.evaluation.bench import decoded_bytes, joules, run_bench
from llmprune.evaluation.generation import compare_generation, ends_in_loop, repetition
from llmprune.evaluation.held_out import compare_predictions, perplexity
from llmprune.evaluation.section import Generation
from llmprune.evaluation.speed import time_generation
from llmprune.model.loading import dense_decoder
from llmprune.model.verify_worker import generate
from llmprune.report.value import BenchSize
from llmprune.testing import VOCABULARY, tiny_model


def windows(count: int = 5, length: int = 24) -> torch.Tensor:
    """Token windows [N, L]."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def test_a_model_does_not_diverge_from_itself() -> None:
    """The same model twice: no divergence at all, the same first tokens, one perplexity."""
    decoder = dense_decoder(tiny_model("llama"))
    before, after, figures = compare_predictions(decoder, decoder, windows(), 2)
    assert before == after == perplexity(decoder, windows(), 2, "alone")
    assert (figures.mean, figures.same_first, figures.tokens) == (0.0, 1.0, 5 * 23)
    assert set(figures.quantiles.values()) == {0.0}


def test_divergence_is_that_of_the_distributions() -> None:
    """Mean and quantiles are those of KL(dense ‖ pruned) over every next token, as torch computes it in one piece."""
    dense, pruned = tiny_model("llama"), tiny_model("llama", seed=1)
    *_, figures = compare_predictions(dense_decoder(dense), dense_decoder(pruned), windows(), 2)
    log_p, log_q = (model(windows()).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (dense, pruned))
    every = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert figures.mean == pytest.approx(float(every.mean()), rel=1e-4)
    assert figures.quantiles["1.0"] == pytest.approx(float(every.max()), rel=1e-4)
    assert figures.quantiles["0.5"] == pytest.approx(float(every.sort().values[57]), rel=1e-4)
    assert figures.same_first == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5, 6], 0.0), ([1, 2, 3, 4] * 2, 1 / 5), ([7] * 10, 6 / 7)],
)
def test_repetition(ids: list[int], share: float) -> None:
    """Sequences of four that were there before, as a share of all."""
    assert repetition(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [([], False), ([1, 1], False), ([1, 1, 1], True), ([9, 8] + [1, 2, 3] * 3, True), ([1, 2, 3] * 3 + [4], False)],
)
def test_loops(ids: list[int], loops: bool) -> None:
    """An end that repeats three times, whatever came before."""
    assert ends_in_loop(ids) is loops


def test_generation_side_by_side() -> None:
    """Both models write on, the text itself is there to compare with, and examples can be read."""
    dense, pruned = tiny_model("llama", vocab_size=260), tiny_model("llama", vocab_size=260, seed=1)
    text = "All happy families are alike; each unhappy family is unhappy in its own way. " * 3
    ids = torch.tensor(tiny_tokenizer()(text)["input_ids"])[:200].view(5, 40)
    settings = Generation(samples=5, prompt_tokens=8, new_tokens=16, batch_size=2)
    figures = compare_generation(dense, pruned, tiny_tokenizer(), ids, settings)
    assert figures.text.tokens == 16
    assert 0 <= figures.dense.repetition <= 1
    assert figures.dense.tokens <= 16
    assert figures.examples[0].prompt == "All happ"
    assert figures.examples[0].dense != figures.examples[0].pruned


def test_a_model_that_says_nothing_is_seen() -> None:
    """A model whose every continuation ends at once writes empty texts of no length."""
    mute = tiny_model("llama", vocab_size=260)
    mute.generation_config.eos_token_id = list(range(260))
    ids = torch.randint(250, (4, 40), generator=torch.Generator().manual_seed(0))
    settings = Generation(samples=4, prompt_tokens=8, new_tokens=16)
    figures = compare_generation(tiny_model("llama", vocab_size=260), mute, tiny_tokenizer(), ids, settings)
    assert (figures.pruned.empty, figures.pruned.tokens) == (1.0, 0.0)
    assert figures.dense.tokens > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Generation(samples=9, prompt_tokens=4, new_tokens=8), "9 prompts, and the held-out text has 5 windows"),
        (Generation(samples=2, prompt_tokens=20, new_tokens=8), "exceed the 24 tokens of a held-out window"),
    ],
)
def test_generation_needs_text(settings: Generation, said: str) -> None:
    """More prompts than windows, or windows too short, are refused with the limit."""
    with pytest.raises(RecipeError, match=said):
        compare_generation(tiny_model("llama"), tiny_model("llama"), tiny_tokenizer(), windows(), settings)


def size() -> BenchSize:
    """Sizes that the bench only passes on."""
    return BenchSize(parameters=1, weights=4, disk=None, kv_bytes_per_token=None, decoded_bytes=4, joules=joules(4))


def test_bench_measures_both_in_turn() -> None:
    """Every batch and context has its times, and a model of one layer decodes faster than one of twelve."""
    models = tiny_model("llama", num_hidden_layers=12), tiny_model("llama", num_hidden_layers=1)
    figures = run_bench(("deep", "flat"), models, (size(), size()), (1, 2), (8,), 6, 4)
    assert [(point.batch_size, point.context) for point in figures.points] == [(1, 8), (2, 8)]
    for point in figures.points:
        assert point.decode.ratio.median > 1
        assert point.decode.ratio.low <= point.decode.ratio.median <= point.decode.ratio.high
        assert point.first_token.base.median > 0
        assert point.prefill.base.median == pytest.approx(
            point.batch_size * point.context / point.first_token.base.median, rel=0.5
        )
    assert (figures.cache, figures.dtype) == ("dynamic", "float32")


@pytest.mark.parametrize(
    "own",
    [{"penalty_alpha": 0.6}, {"dola_layers": "low"}, {"force_words_ids": [[1]]}],
    ids=lambda own: str(*own),
)
def test_no_generation_follows_a_models_own_search(own: dict[str, Any]) -> None:
    """Settings for a search that needs code from the hub neither stop a comparison nor fail a verification."""
    plain, model = (tiny_model("llama", vocab_size=260) for _ in range(2))
    model.generation_config.update(**own)
    before = model.generation_config
    windows_NL = torch.arange(24).reshape(1, 24)
    settings = Generation(samples=1, prompt_tokens=8, new_tokens=8)
    found = compare_generation(plain, model, tiny_tokenizer(), windows_NL, settings)
    assert found.dense == found.pruned
    time_generation(model, windows_NL, 4)
    assert model.generation_config is before
    assert generate(model, windows_NL, True) == generate(plain, windows_NL, True)


def test_a_static_cache_can_be_timed() -> None:
    """Keys and values in place give a time as well."""
    model = tiny_model("llama")
    timing = time_generation(model, windows(2, 8), 4, static_cache=True)
    assert timing.first > 0
    assert timing.rest > 0


def test_bench_needs_positions() -> None:
    """A context that does not fit into a model is refused with the limit."""
    models = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(RecipeError, match="exceed the model's 128 positions"):
        run_bench(("a", "b"), models, (size(), size()), (1,), (125,), 8, 1)


def test_energy_follows_from_the_bytes_that_a_token_reads() -> None:
    """640 pJ a 32-bit word; the embedding table is not read as a whole, unless it is the head as well."""
    untied, tied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (False, True))
    table = untied.get_input_embeddings().weight
    every = sum(parameter.numel() * parameter.itemsize for parameter in untied.parameters())
    assert decoded_bytes(untied) == every - table.numel() * table.itemsize
    assert decoded_bytes(tied) == decoded_bytes(untied)
    assert joules(4_000_000) == pytest.approx(640e-6)
    assert math.isclose(joules(decoded_bytes(tied)), decoded_bytes(tied) * 160e-12)
