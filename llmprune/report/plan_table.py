"""Plan of a run as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.common.schema import format_count, format_size
from llmprune.results.formatting import plural, ranges
from llmprune.results.sentences import describe_carried, describe_left
from llmprune.results.size_table import size_rows

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print sizes before and after, requirements of the run, and notes."""
    console.print(Text(f"{plan.model} ({plan.model_type}, {plan.dtype})", style="bold"))
    console.print()
    console.print(_sizes(plan))
    console.print()
    for line in (*_cut_lines(plan), *_requirements(plan), *_device_lines(plan)):
        console.print(Text(line))
    if plan.shortage:
        console.print(Text.assemble(("Too little memory here: ", "red"), plan.shortage))
    for note in plan.notes:
        console.print(Text.assemble(("Note: ", "yellow"), note))


def _sizes(plan: Plan) -> Table:
    about = "" if plan.parameters_exact else "about "
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("pruned", justify="right", style="bold")
    table.add_column("of dense", justify="right")
    for row in size_rows(plan.dense, plan.pruned):
        table.add_row(row.label, row.dense, f"{about}{row.pruned}", row.of_dense)
    return table


def _cut_lines(plan: Plan) -> Iterator[str]:
    if plan.removed_layers is None:
        removed = plan.dense.layers - plan.keep_layers
        yield f"Layers: {removed} to be removed, selected by their scores"
    elif plan.removed_layers:
        yield f"Layers: {ranges(sorted(plan.removed_layers))} to be removed"
    if sparse := plan.sparsity:
        yield (
            f"Sparsity: {sparse.pattern} in {plural(sparse.matrices, 'matrix', many='matrices')}, "
            f"{format_count(sparse.zeros)} of their {format_count(sparse.weights)} weights become zero "
            "(stored as zeros: the file size does not change)"
        )


def _requirements(plan: Plan) -> Iterator[str]:
    windows, length = plan.calibration
    memory = plan.memory
    yield f"Calibration: {plural(windows, 'window')} of {plural(length, 'token')}"
    yield (
        f"Memory: about {format_size(memory.total)} in total: weights {format_size(memory.weights)} on the devices of "
        f"the device map, one layer {format_size(memory.layer)}, hidden states {format_size(memory.streams)}, "
        f"refit {format_size(memory.statistics)}"
    )
    yield f"Disk: {format_size(plan.disk)} for the result, twice that while it is written"
    if plan.base_files.carried:
        yield f"Files of the base model that are copied unchanged: {describe_carried(plan.base_files)}"
    if plan.base_files.left:
        yield f"Files of the base model that are not copied: {describe_left(plan.base_files)}"


def _device_lines(plan: Plan) -> Iterator[str]:
    """Yield the number of windows in a batch, and for each device what the run plans to keep on it."""
    chosen = plan.batch_sizes
    held_out = f", of held-out text {chosen.held_out}" if chosen.held_out != chosen.calibration else ""
    yield f"Batches: {plural(chosen.calibration, 'window')} at a time{held_out}"
    for device in plan.devices:
        parts = {
            "embeddings and head": device.outside,
            "one layer dense, cut and the next" if device.device != "cpu" else "layers": device.layers,
            "statistics": device.statistics,
            "a batch": device.activations,
            "hidden states": device.streams,
        }
        listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        stay = f"; layers that stay on it {format_size(device.resident)}" if device.resident else ""
        yield (
            f"{'Main memory' if device.device == 'cpu' else device.device}: {format_size(device.working)} of "
            f"{format_size(device.free)} free: {listed}{stay}"
        )
