"""A bench as a person reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.report.value import BenchFigures, BenchSize, Pair, SparseProduct, Spread
from llmprune.report.wording import count, number, percent, share, weight

_FASTER = 1.05  # dense / sparse; less may be noise


def print_bench(figures: BenchFigures, console: Console) -> None:
    """Print sizes, then times by batch size and context; 80 columns are enough."""
    console.print(_sizes(figures))
    console.print()
    console.print(_times(figures))
    console.print()
    if figures.products:
        console.print(_products(figures.products))
        console.print()
        console.print(_where(figures.products))
        console.print()
    console.print(
        Text(
            "Tokens per second; peak memory beyond the models' weights. "
            f"{figures.device}, {figures.dtype}, {figures.cache} cache, {figures.new_tokens} new tokens; medians of "
            f"{figures.repeats} runs of each model in turn, with quartiles in brackets where there are four or more, "
            "else least and most. DRAM energy is an estimate from the sizes: 640 pJ per 32-bit word (Horowitz, ISSCC "
            "2014), a batch of one.",
            style="dim",
        )
    )


def energy(value: float) -> str:
    """``86 mJ``."""
    return f"{value * 1000:.3g} mJ"


def milliseconds(value: float) -> str:
    """``41.2 ms``, ``2.8 s``."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _sizes(figures: BenchFigures) -> Table:
    table = _table("", "base", "model", "of base")
    rows: list[tuple[str, Callable[[BenchSize], float | None], Callable[[float], str]]] = [
        ("parameters", lambda size: size.parameters, count),
        ("weights in memory", lambda size: size.weights, weight),
        ("weights on disk", lambda size: size.disk, weight),
        ("KV cache per token", lambda size: size.kv_bytes_per_token, weight),
        ("weights read per decoded token", lambda size: size.decoded_bytes, weight),
        ("DRAM energy of that (estimate)", lambda size: size.joules, energy),
    ]
    for name, figure, write in rows:
        base, model = figure(figures.base_size), figure(figures.model_size)
        if base is not None and model is not None:
            table.add_row(name, write(base), write(model), percent(share(base, model)))
    return table


def _times(figures: BenchFigures) -> Table:
    table = _table("batch × tokens", "", "base", "model", "model / base")
    for point in figures.points:
        where = f"{point.batch_size} × {point.context:,}"
        rows: list[tuple[str, Pair, Callable[[float], str]]] = [
            ("first token", point.first_token, milliseconds),
            ("prefill/s", point.prefill, number),
            ("decode/s", point.decode, number),
        ]
        for name, pair, write in rows:
            table.add_row(where, name, write(pair.base.median), write(pair.model.median), _ratio(pair.ratio))
            where = ""
        if all(point.peak):
            table.add_row("", "peak memory", *map(weight, point.peak), f"{point.peak[1] / point.peak[0]:.2f}×")
    return table


def _products(products: Sequence[SparseProduct]) -> Table:
    table = _table("matrix", "of them", "tokens", "dense", "2:4", "speed", "differs")
    for one in products:
        times = f"{one.dense:.3g} ms", f"{one.sparse:.3g} ms", f"{one.dense / one.sparse:.2f}×"
        shape = f"{one.outputs:,} × {one.inputs:,}"
        table.add_row(shape, count(one.matrices), count(one.tokens), *times, f"{one.difference:.1g}")
    return table


def _where(products: Sequence[SparseProduct]) -> str:
    """In how many of the measured cases 2:4 is faster, and where most."""
    faster = [one for one in products if one.dense > _FASTER * one.sparse]
    if not faster:
        return "2:4 is nowhere faster on this device: store and serve the model as it is."
    best = max(faster, key=lambda one: one.dense / one.sparse)
    return (
        f"2:4 is faster in {len(faster)} of {len(products)} cases, most for {best.outputs:,} × {best.inputs:,} at "
        f"{best.tokens:,} tokens ({best.dense / best.sparse:.2f}×)."
    )


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in heads:
        right = head not in ("", "batch × tokens")
        table.add_column(head, justify="right" if right else "left", overflow="fold", no_wrap=not right)
    return table
