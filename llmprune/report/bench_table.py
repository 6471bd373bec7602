"""Results of ``llmprune bench`` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.common.schema import format_scaled
from llmprune.results.figures.bench import BenchFigures, BenchSize, Pair, SparseProduct
from llmprune.results.formatting import byte_size, count, number, percent, plural, share, times

_MIN_SPEEDUP = 1.05  # dense / sparse; a smaller ratio may be noise


def print_bench(figures: BenchFigures, console: Console) -> None:
    """Print sizes, then times by batch size and context length, within 80 columns."""
    console.print(_sizes(figures))
    console.print()
    console.print(_times(figures))
    console.print()
    if figures.products:
        console.print(_products(figures.products))
        console.print()
        console.print(_best_case(figures.products))
        console.print()
    console.print(
        Text(
            "Tokens per second; peak memory in addition to the models' weights. "
            f"{figures.device}, {figures.dtype}, {figures.cache} cache, {figures.new_tokens} new tokens; medians of "
            f"{plural(figures.repeats, 'run')} of each model, alternating, and their ratio model / base; in brackets "
            "the quartiles of model / base over the pairs of runs, or minimum and maximum of fewer than four. DRAM "
            "energy is estimated from the sizes: 640 pJ per 32-bit word (Horowitz, ISSCC 2014), batch size product.",
            style="dim",
        )
    )


def energy(value: float) -> str:
    """Format joules: ``86 mJ``, ``1.2 J``."""
    return format_scaled(value * 1000, ("mJ", "J", "kJ"))


def seconds(value: float) -> str:
    """Format seconds: ``41.2 ms``, ``2.8 s``."""
    return format_scaled(value * 1000, ("ms", "s"))


def _sizes(figures: BenchFigures) -> Table:
    table = _table("", "base", "model", "of base")
    rows: list[tuple[str, Callable[[BenchSize], float | None], Callable[[float], str]]] = [
        ("parameters", lambda size: size.parameters, count),
        ("weights in memory", lambda size: size.weights, byte_size),
        ("weights on disk", lambda size: size.disk, byte_size),
        ("KV cache per token", lambda size: size.kv_bytes_per_token, byte_size),
        ("weights read per decoded token", lambda size: size.decoded_bytes, byte_size),
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
        case = f"{point.batch_size} × {point.context:,}"
        rows: list[tuple[str, Pair, Callable[[float], str]]] = [
            ("first token", point.first_token, seconds),
            ("prefill/s", point.prefill, number),
            ("decode/s", point.decode, number),
        ]
        for name, pair, write in rows:
            table.add_row(case, name, write(pair.base.median), write(pair.model.median), _ratio(pair))
            case = ""
        if all(point.peak):
            table.add_row("", "peak memory", *map(byte_size, point.peak), times(share(*point.peak)))
    return table


def _products(products: Sequence[SparseProduct]) -> Table:
    table = _table("matrix", "count", "tokens", "dense", "2:4", "speed", "difference")
    for product in products:
        figures = (
            seconds(product.dense / 1000),
            seconds(product.sparse / 1000),
            times(share(product.sparse, product.dense)),
        )
        shape = f"{product.outputs:,} × {product.inputs:,}"
        table.add_row(shape, count(product.matrices), count(product.tokens), *figures, f"{product.difference:.1g}")
    return table


def _best_case(products: Sequence[SparseProduct]) -> str:
    """Return a sentence: in how many cases 2:4 is faster, and the case with the largest speedup."""
    faster = [product for product in products if product.dense > _MIN_SPEEDUP * product.sparse]
    if not faster:
        return "2:4 is not faster in any case on this device: store and serve the model as it is."
    best = max(faster, key=lambda product: product.dense / product.sparse)
    return (
        f"2:4 is faster in {len(faster)} of {len(products)} cases, most for a matrix of {best.outputs:,} × "
        f"{best.inputs:,} at {best.tokens:,} tokens ({best.dense / best.sparse:.2f}×)."
    )


def _ratio(pair: Pair) -> str:
    """Format model / base of the displayed medians, and its range over the pairs of runs."""
    ratio = pair.model.median / pair.base.median
    return f"{times(ratio)} ({min(pair.ratio.low, ratio):.2f}–{max(pair.ratio.high, ratio):.2f})"


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in heads:
        right = head not in ("", "batch × tokens")
        table.add_column(head, justify="right" if right else "left", overflow="fold", no_wrap=not right)
    return table
