"""Generation speed, memory and energy of two models."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
from helpers.lm_eval_tasks import tiny_llama
from helpers.random_inputs import windows
from helpers.whole_models import timed

from llmprune.common.errors import EvaluationError, RecipeError
from llmprune.evaluation.bench.generation_speed import time_generation
from llmprune.evaluation.bench.speed_and_memory import (
    BenchModel,
    BenchSettings,
    decoded_bytes,
    joules,
    run_bench,
)
from llmprune.recipe.evaluation import Speed
from llmprune.results.figures.bench import BenchSize
from llmprune.testing import tiny_model


def test_speed_is_measured_pair_by_pair(capfd: pytest.CaptureFixture[str]) -> None:
    """A model of many layers is slower than one of few; generation settings do not change, nothing is printed."""
    dense, pruned = tiny_llama(layers=12), tiny_llama(layers=1)
    dense.generation_config.temperature, dense.generation_config.do_sample = 0.3, True
    before = deepcopy(dense.generation_config)
    figures = timed(dense, pruned, Speed(batch_size=2, prompt_tokens=8, new_tokens=8, repeats=3))
    assert figures.ratio > 1
    assert figures.ratio_low <= figures.ratio <= figures.ratio_high
    assert (figures.repeats, figures.new_tokens) == (3, 8)
    assert figures.device.startswith("CPU")
    assert dense.generation_config == before
    assert capfd.readouterr() == ("", "")


def test_speed_needs_positions() -> None:
    """Prompt and new tokens that exceed the model's positions are refused with the limit."""
    model = tiny_llama(layers=1)
    with pytest.raises(RecipeError, match="exceed the model's 64 positions"):
        timed(model, model, Speed(prompt_tokens=60, new_tokens=8))


def test_generation_that_stops_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the model and both numbers of tokens."""
    model = tiny_llama(layers=1)
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda *given, **more: original(*given, **more)[:, :-1])
    with pytest.raises(EvaluationError, match="LlamaForCausalLM generated 3 tokens instead of 4"):
        timed(model, model, Speed(prompt_tokens=8, new_tokens=4))


def size() -> BenchSize:
    """Return sizes, which the bench copies into its result."""
    return BenchSize(parameters=1, weights=4, disk=None, kv_bytes_per_token=None, decoded_bytes=4, joules=joules(4))


def test_bench_measures_both_in_turn() -> None:
    """Every batch size and context is timed, and a model of one layer decodes faster than one of twelve."""
    deep, flat = (BenchModel(str(n), tiny_model("llama", num_hidden_layers=n), size()) for n in (12, 1))
    settings = BenchSettings(batch_sizes=(1, 2), contexts=(8,), new_tokens=6, repeats=4)
    figures = run_bench(deep, flat, settings=settings)
    assert [(point.batch_size, point.context) for point in figures.points] == [(1, 8), (2, 8)]
    for point in figures.points:
        assert point.decode.ratio.median > 1
        assert point.decode.ratio.low <= point.decode.ratio.median <= point.decode.ratio.high
        assert point.first_token.base.median > 0
        assert point.prefill.base.median == pytest.approx(
            point.batch_size * point.context / point.first_token.base.median, rel=0.5
        )
    assert (figures.cache, figures.dtype) == ("dynamic", "float32")


def test_a_static_cache_can_be_timed() -> None:
    """A preallocated key-value cache can be timed."""
    model = tiny_model("llama")
    timing = time_generation(model, windows(2, 8), new_tokens=4, static_cache=True)
    assert timing.first > 0
    assert timing.rest > 0


def test_bench_needs_positions() -> None:
    """A context that exceeds the model's positions is refused with the limit."""
    model = BenchModel("a", tiny_model("llama"), size())
    settings = BenchSettings(batch_sizes=(1,), contexts=(125,), new_tokens=8, repeats=1)
    with pytest.raises(RecipeError, match="exceed the model's 128 positions"):
        run_bench(model, model, settings=settings)


def test_energy_follows_from_the_bytes_that_a_token_reads() -> None:
    """640 pJ per 32-bit word; the embedding table is read completely only if it is also the output head."""
    untied, tied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (False, True))
    table = untied.get_input_embeddings().weight
    every = sum(parameter.numel() * parameter.itemsize for parameter in untied.parameters())
    assert decoded_bytes(untied) == every - table.numel() * table.itemsize
    assert decoded_bytes(tied) == decoded_bytes(untied)
    assert joules(4_000_000) == pytest.approx(640e-6)
    assert math.isclose(joules(decoded_bytes(tied)), decoded_bytes(tied) * 160e-12)
