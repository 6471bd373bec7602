"""A speed table for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.common.schema import format_scaled
from llmprune.results.figures.speed_table import PartTimes, SpeedPrediction, SpeedTable
from llmprune.results.formatting import number, percent, plural


def print_speed_table(table: SpeedTable, dense: SpeedPrediction, *, console: Console) -> None:
    """Print the times of the parts, and how they were measured. ``dense``: the speed of the dense model."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in ("part", "", "prefill", "decoded token"):
        shown.add_column(head, justify="left" if head in ("part", "") else "right")
    for part, size, times in _rows(table):
        shown.add_row(part, size, _seconds(times.prefill), _seconds(times.decode))
    console.print(shown)
    console.print()
    console.print(
        Text(
            f"Seconds of a batch of {table.batch_size} × {table.prompt_tokens:,} tokens, and of a token decoded after "
            f"each of its prompts. The dense model of {plural(table.sizes.layers, 'layer')} generates "
            f"{number(dense.tokens_per_second)} tokens per second, over {table.new_tokens} new tokens and the prefill. "
            f"{table.device}, {table.dtype}; {plural(table.rounds, 'round')} of random models with up to "
            f"{plural(table.layers_timed, 'layer')}; ratios of their times are known to "
            f"± {percent(table.uncertainty)}.",
            style="dim",
        )
    )


def _rows(table: SpeedTable) -> list[tuple[str, str, PartTimes]]:
    """Return name, size and times of each part."""
    sizes = table.sizes
    rows: list[tuple[str, str, PartTimes]] = [("outside the layers", "", table.outside)]
    for one in table.vocabulary:
        if one.at < 1 and sizes.vocabulary:
            rows.append(("change outside", plural(round(one.at * sizes.vocabulary), "token"), one))
    for one in reversed(table.attention):
        groups = plural(round(one.at * sizes.kv_groups), "group") if sizes.kv_groups else ""
        rows.append(("layer without its MLP" if table.mlp else "layer", groups, one))
    for one in reversed(table.mlp):
        widths = "/".join(str(round(one.at * width)) for width in sizes.widths.values())
        rows.append(("MLP of a layer", f"{widths} neurons", one))
    if sizes.experts:
        less = [one for one in table.experts if one.at < 1]
        rows += [("change of a layer", plural(round(one.at * sizes.experts), "expert"), one) for one in less]
    return rows


def _seconds(value: float) -> str:
    """Format seconds: ``0.41 ms``, ``2.8 s``."""
    return f"-{_seconds(-value)}" if value < 0 else format_scaled(value * 1000, ("ms", "s"))
