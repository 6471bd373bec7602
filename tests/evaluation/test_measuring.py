"""What is measured beside tasks: divergence, free generation, a bench, on models that run in milliseconds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_tokenizer

from llmprune.checkpoint.loading import dense_decoder
from llmprune.checkpoint.verify_worker import generate
from llmprune.common.errors import NumericalError, RecipeError
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.repaired_divergence import Residual
from llmprune.evaluation.bench.generation_speed import time_generation
from llmprune.evaluation.bench.speed_and_memory import decoded_bytes, joules, run_bench
from llmprune.evaluation.generation import compare_generation, ends_in_loop, repetition
from llmprune.evaluation.perplexity import compare_predictions, perplexity
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.recipe.evaluation import Generation
from llmprune.results.schema import BenchSize
from llmprune.testing import VOCABULARY, tiny_model


def windows(count: int = 5, length: int = 24) -> torch.Tensor:
    """Token windows [N, L]."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def test_a_model_does_not_diverge_from_itself() -> None:
    """The same model twice: no divergence at all, the same first tokens, one perplexity."""
    decoder = dense_decoder(tiny_model("llama"))
    before, after, figures = compare_predictions(decoder, decoder, windows_NL=windows(), batch_size=2)
    assert before == after == perplexity(decoder, windows(), batch_size=2, what="alone")
    assert (figures.mean, figures.same_first, figures.tokens) == (0.0, 1.0, 5 * 23)
    assert set(figures.quantiles.values()) == {0.0}


def test_divergence_is_that_of_the_distributions() -> None:
    """Mean and quantiles are those of KL(dense ‖ pruned) over every next token, as torch computes it in one piece."""
    dense, pruned = tiny_model("llama"), tiny_model("llama", seed=1)
    *_, figures = compare_predictions(dense_decoder(dense), dense_decoder(pruned), windows_NL=windows(), batch_size=2)
    log_p, log_q = (model(windows()).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (dense, pruned))
    every = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert figures.mean == pytest.approx(float(every.mean()), rel=1e-4)
    assert figures.quantiles["1.0"] == pytest.approx(float(every.max()), rel=1e-4)
    assert figures.quantiles["0.5"] == pytest.approx(float(every.sort().values[57]), rel=1e-4)
    assert figures.same_first == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def reference(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in float64, term by term as it is defined; no term where p is 0."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (p_logits, q_logits))
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def logits_of(seed: int, masked: slice | None = None) -> torch.Tensor:
    """Logits [3, 5, 64]; the masked entries of the vocabulary are −inf."""
    made = 3 * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed))
    if masked is not None:
        made[..., masked] = -math.inf
    return made


def test_identical_distributions_have_no_divergence() -> None:
    """0 exactly, also where entries of the vocabulary are masked, and where they are written by other logits."""
    for masked in (None, slice(40, 64)):
        logits = logits_of(0, masked)
        assert torch.equal(kl_divergence(logits, logits), torch.zeros(3, 5))
        assert kl_divergence(logits, logits + 7).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_divergence_is_right_in_float32(scale: float) -> None:
    """Of distributions that hardly differ more than rounding is left, and nothing is below 0."""
    p_logits = logits_of(0)
    q_logits = p_logits + scale * torch.randn(p_logits.shape, generator=torch.Generator().manual_seed(1))
    found = kl_divergence(p_logits, q_logits)
    assert found.dtype == torch.float32
    assert (found > 0).all()
    torch.testing.assert_close(found.double(), reference(p_logits, q_logits), rtol=5e-3, atol=0)


def test_divergence_counts_masked_entries_by_who_masks_them() -> None:
    """Masked by both or by p alone: finite and as defined. By q alone: infinite. Infinitesimal chances are no NaN."""
    p, both, q = logits_of(0), slice(40, 64), logits_of(1)
    p_masked, q_masked = logits_of(0, both), logits_of(1, both)
    for other in (q_masked, q):
        torch.testing.assert_close(kl_divergence(p_masked, other), reference(p_masked, other).float())
    assert (kl_divergence(p, q_masked) == math.inf).all()
    far = torch.tensor([[0.0, -200.0, -math.inf]])
    assert kl_divergence(far, torch.tensor([[0.0, -math.inf, -math.inf]])).tolist() == [0.0]
    assert kl_divergence(far, torch.tensor([[-200.0, 0.0, 0.0]])).isfinite().all()
    assert kl_divergence(torch.tensor([[0.0, torch.nan]]), torch.zeros(1, 2)).isnan().all()


def test_divergence_takes_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms are held for some rows at a time, which changes nothing."""
    whole = kl_divergence(logits_of(0), logits_of(1))
    for at_once in (1, 64 * 4):
        monkeypatch.setattr("llmprune.common.linalg.kl_divergence._AT_ONCE", at_once)
        assert torch.equal(kl_divergence(logits_of(0), logits_of(1)), whole)


def test_the_criteria_and_the_held_out_text_agree() -> None:
    """Both depth criteria cost what the evaluation measures, masked entries included."""
    dense, other = logits_of(0, slice(60, 64)), logits_of(1, slice(60, 64))
    wanted = kl_divergence(dense[:, :-1], other[:, :-1])
    for criterion in (Divergence(), Residual()):
        assert torch.equal(criterion.token_costs(other, dense, ids_BL=torch.zeros(3, 5, dtype=torch.int64)), wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_the_evaluation(value: float) -> None:
    """Of either model and of the cut alone: an error that names the model, and no infinite perplexity."""
    right, broken = (dense_decoder(tiny_model("llama", tie_word_embeddings=False)) for _ in range(2))
    with torch.no_grad():
        broken.skeleton.lm_head.weight[5] = value
    for models, what in (((broken, right), "dense"), ((right, broken), "pruned")):
        with pytest.raises(NumericalError, match=f"held-out text, {what} model: its logits are NaN or infinite"):
            compare_predictions(*models, windows_NL=windows(), batch_size=2)
    with pytest.raises(NumericalError, match="held-out text, cut model"):
        perplexity(broken, windows(), batch_size=2, what="cut")


def test_tokens_that_a_model_masks_are_infinitely_perplexing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary entry at −inf is a statement and no error: other tokens keep their figures."""
    decoder = dense_decoder(tiny_model("llama"))
    original = LayerwiseForward.logits
    ids, masked = windows() % 32, torch.zeros(VOCABULARY)
    masked[32:] = -math.inf
    monkeypatch.setattr(LayerwiseForward, "logits", lambda walk, batch: original(walk, batch) + masked)
    before, after, figures = compare_predictions(decoder, decoder, windows_NL=ids, batch_size=2)
    assert (figures.mean, figures.same_first) == (0.0, 1.0)
    assert math.isfinite(before)
    assert before == after
    assert perplexity(decoder, ids + 32, batch_size=2, what="alone") == math.inf


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
    figures = compare_generation(dense, pruned, tokenizer=tiny_tokenizer(), windows_NL=ids, settings=settings)
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
    figures = compare_generation(
        tiny_model("llama", vocab_size=260), mute, tokenizer=tiny_tokenizer(), windows_NL=ids, settings=settings
    )
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
        compare_generation(
            tiny_model("llama"),
            tiny_model("llama"),
            tokenizer=tiny_tokenizer(),
            windows_NL=windows(),
            settings=settings,
        )


def size() -> BenchSize:
    """Sizes that the bench only passes on."""
    return BenchSize(parameters=1, weights=4, disk=None, kv_bytes_per_token=None, decoded_bytes=4, joules=joules(4))


def test_bench_measures_both_in_turn() -> None:
    """Every batch and context has its times, and a model of one layer decodes faster than one of twelve."""
    models = tiny_model("llama", num_hidden_layers=12), tiny_model("llama", num_hidden_layers=1)
    figures = run_bench(
        ("deep", "flat"), models, sizes=(size(), size()), batch_sizes=(1, 2), contexts=(8,), new_tokens=6, repeats=4
    )
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
    found = compare_generation(plain, model, tokenizer=tiny_tokenizer(), windows_NL=windows_NL, settings=settings)
    assert found.dense == found.pruned
    time_generation(model, windows_NL, new_tokens=4)
    assert model.generation_config is before
    assert generate(model, windows_NL, use_cache=True) == generate(plain, windows_NL, use_cache=True)


def test_a_static_cache_can_be_timed() -> None:
    """Keys and values in place give a time as well."""
    model = tiny_model("llama")
    timing = time_generation(model, windows(2, 8), new_tokens=4, static_cache=True)
    assert timing.first > 0
    assert timing.rest > 0


def test_bench_needs_positions() -> None:
    """A context that does not fit into a model is refused with the limit."""
    models = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(RecipeError, match="exceed the model's 128 positions"):
        run_bench(
            ("a", "b"), models, sizes=(size(), size()), batch_sizes=(1,), contexts=(125,), new_tokens=8, repeats=1
        )


def test_energy_follows_from_the_bytes_that_a_token_reads() -> None:
    """640 pJ a 32-bit word; the embedding table is not read as a whole, unless it is the head as well."""
    untied, tied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (False, True))
    table = untied.get_input_embeddings().weight
    every = sum(parameter.numel() * parameter.itemsize for parameter in untied.parameters())
    assert decoded_bytes(untied) == every - table.numel() * table.itemsize
    assert decoded_bytes(tied) == decoded_bytes(untied)
    assert joules(4_000_000) == pytest.approx(640e-6)
    assert math.isclose(joules(decoded_bytes(tied)), decoded_bytes(tied) * 160e-12)
