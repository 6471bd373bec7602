"""Figures of a bench as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from llmprune.common.schema import format_scaled
from llmprune.results.figures.bench import BenchFigures, Pair
from llmprune.results.formatting import byte_size, number, share, times
from llmprune.service.api.dependencies import Service
from llmprune.service.supervisor.follow_up_commands import BENCH

_MOST_BYTES = 1_000_000  # of the file


@dataclass(frozen=True)
class Row:
    """One figure of base and model. ``ratio``: model / base; ``spread``: of the ratio, where it was timed."""

    name: str
    base: str
    model: str
    ratio: str
    spread: str = ""


@dataclass(frozen=True)
class Case:
    """Figures of one batch size and prompt length."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class BenchTable:
    """Figures of a bench. ``how``: device, arithmetic and number of runs."""

    base: str
    model: str
    cases: tuple[Case, ...]
    how: str


def bench_of(service: Service, job: str) -> BenchTable | None:
    """Return the figures of a job that timed a model; None where there are none, or they cannot be read."""
    try:
        with (service.settings.run_folder(job) / BENCH).open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8")
        found = BenchFigures.model_validate_json(service.paths.hide(text))
    except (OSError, ValueError, ValidationError):
        return None
    runs = "1 run" if found.repeats == 1 else f"{found.repeats} runs"
    how = f"{found.device}, {found.dtype}, {found.cache} cache, {found.new_tokens} new tokens; medians of {runs}"
    sizes = Case("Sizes", tuple(_sizes(found)))
    return BenchTable(found.base, found.model, (sizes, *_cases(found)), how)


def _sizes(found: BenchFigures) -> list[Row]:
    base, model = found.base_size, found.model_size
    return [
        Row(name, byte_size(one), byte_size(other), times(share(one, other)))
        for name, one, other in (
            ("Weights in memory", base.weights, model.weights),
            ("Cache for a token", base.kv_bytes_per_token, model.kv_bytes_per_token),
        )
        if one is not None and other is not None
    ]


def _cases(found: BenchFigures) -> list[Case]:
    cases = []
    for point in found.points:
        prompts = "1 prompt" if point.batch_size == 1 else f"{point.batch_size} prompts"
        rows = [
            _timed("First token", point.first_token, seconds=True),
            _timed("Prompt tokens per second", point.prefill),
            _timed("New tokens per second", point.decode),
        ]
        if all(point.peak):
            one, other = point.peak
            rows.append(Row("Peak memory besides", byte_size(one), byte_size(other), times(share(one, other))))
        cases.append(Case(f"{prompts} of {point.context:,} tokens", tuple(rows)))
    return cases


def _timed(name: str, pair: Pair, *, seconds: bool = False) -> Row:
    def write(value: float) -> str:
        return format_scaled(value * 1000, ("ms", "s")) if seconds else number(value)

    ratio, spread = times(pair.ratio.median), f"{pair.ratio.low:.2f} to {pair.ratio.high:.2f}"
    return Row(name, write(pair.base.median), write(pair.model.median), ratio, spread)
