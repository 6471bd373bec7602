"""The plan as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.common.schema import format_count, format_size
from llmprune.results.formatting import (
    describe_carried,
    describe_left,
    if_changed,
    percent,
    plural,
    ranges,
    share,
    width_names,
)

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print sizes before and after, what the run needs, and notes."""
    about = "" if plan.parameters_exact else "about "
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("pruned", justify="right", style="bold")
    table.add_column("of dense", justify="right")
    rows = [
        ("parameters", plan.dense.parameters, plan.pruned.parameters, format_count),
        ("weights", plan.dense.bytes, plan.pruned.bytes, format_size),
        ("layers", plan.dense.layers, plan.pruned.layers, format_count),
        *(
            (name, plan.dense.widths[field], plan.pruned.widths.get(field), format_count)
            for field, name in width_names(plan.dense.widths).items()
        ),
        ("experts", plan.dense.experts, plan.pruned.experts, format_count),
        ("key-value heads", *if_changed(plan.dense.kv_groups, plan.pruned.kv_groups), format_count),
        ("KV cache per token", plan.dense.kv_bytes_per_token, plan.pruned.kv_bytes_per_token, format_size),
    ]
    for name, dense, pruned, form in rows:
        if dense is not None and pruned is not None:
            table.add_row(name, form(dense), f"{about}{form(pruned)}", percent(share(dense, pruned)))
    console.print(Text(f"{plan.model} ({plan.model_type}, {plan.dtype})", style="bold"))
    console.print()
    console.print(table)
    console.print()
    if plan.removed_layers is None:
        going = plan.dense.layers - plan.keep_layers
        console.print(f"Layers: {going} {'goes' if going == 1 else 'go'}, chosen by their scores")
    elif plan.removed_layers:
        gone = sorted(plan.removed_layers)
        console.print(f"Layers: {ranges(gone)} {'goes' if len(gone) == 1 else 'go'}")
    if plan.sparsity:
        sparse = plan.sparsity
        console.print(
            f"Sparsity: {sparse.pattern} in {plural(sparse.matrices, 'matrix', many='matrices')}, "
            f"{format_count(sparse.zeros)} of their "
            f"{format_count(sparse.weights)} weights become zero (stored as zeros: the size stays)"
        )
    windows, length = plan.calibration
    console.print(f"Calibration: {plural(windows, 'window')} of {plural(length, 'token')}")
    memory = plan.memory
    console.print(
        f"Memory: about {format_size(memory.total)} in all: weights {format_size(memory.weights)} where the device "
        f"map puts them, one layer {format_size(memory.layer)}, hidden states {format_size(memory.streams)}, "
        f"refit {format_size(memory.statistics)}"
    )
    console.print(f"Disk: {format_size(plan.disk)} for the result, twice that while it is written")
    if plan.base_files.carried:
        console.print(Text(f"Files of the base that come along unchanged: {describe_carried(plan.base_files)}"))
    if plan.base_files.left:
        console.print(Text(f"Files of the base left behind: {describe_left(plan.base_files)}"))
    for note in plan.notes:
        console.print(Text.assemble(("Note: ", "yellow"), note))
