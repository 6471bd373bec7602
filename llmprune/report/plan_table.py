"""Plan of a run as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.common.schema import format_count, format_size
from llmprune.common.time_left import rough_duration
from llmprune.report.budget_lines import budget_lines
from llmprune.results.formatting import plural, ranges
from llmprune.results.sentences.calibration import describe_text
from llmprune.results.sentences.next_tools import describe_next_tools
from llmprune.results.sentences.result_files import describe_carried, describe_left
from llmprune.results.tables.rounds import size_columns
from llmprune.results.tables.sizes import size_rows

if TYPE_CHECKING:
    from llmprune.planning.plan_schema import Plan
    from llmprune.planning.vocabulary.plan import VocabularyPlan

_BUSY = 1.2  # times as long as on a machine that does nothing else


def print_plan(plan: Plan, console: Console) -> None:
    """Print sizes before and after, requirements of the run, and notes."""
    console.print(Text(f"{plan.model} ({plan.model_type}, {plan.dtype})", style="bold"))
    console.print()
    console.print(_sizes(plan))
    console.print()
    if plan.rounds:
        console.print(_rounds(plan))
        console.print()
    for line in (
        *(budget_lines(plan.budget) if plan.budget else ()),
        *_cut_lines(plan),
        *_tool_lines(plan),
        *_requirements(plan),
        *_recovery_lines(plan),
        *_task_lines(plan),
        *_device_lines(plan),
        *_time_lines(plan),
    ):
        console.print(Text(line))
    if plan.shortage:
        console.print(Text.assemble(("Too little memory here: ", "red"), plan.shortage))
    for note in (*plan.notes, *plan.lost_tools):
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


def _rounds(plan: Plan) -> Table:
    """Return the sizes after each round, and the tokens that it trains on."""
    sizes = size_columns([plan.dense, *(one.size for one in plan.rounds)])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in (*sizes.heads, "trained on"):
        table.add_column(head, justify="left" if head == "round" else "right")
    tokens = [None, *(one.tokens for one in plan.rounds)]
    for row, number in zip(sizes.rows, tokens, strict=True):
        table.add_row(*row, "" if number is None else f"{format_count(number)} tokens")
    return table


def _cut_lines(plan: Plan) -> Iterator[str]:
    if plan.removed_layers is None:
        removed = plan.dense.layers - plan.keep_layers
        by = "the search" if plan.budget else "their scores"
        yield f"Layers: {removed} to be removed, selected by {by}"
    elif plan.removed_layers:
        yield f"Layers: {ranges(sorted(plan.removed_layers))} to be removed"
    if vocabulary := plan.vocabulary:
        yield f"Vocabulary: {_tokens(vocabulary)}"
    if sparse := plan.sparsity:
        yield (
            f"Sparsity: {sparse.pattern} in {plural(sparse.matrices, 'matrix', many='matrices')}, "
            f"{format_count(sparse.zeros)} of their {format_count(sparse.weights)} weights become zero "
            "(stored as zeros: the file size does not change)"
        )


def _tool_lines(plan: Plan) -> Iterator[str]:
    """Yield the tools that take the planned shape."""
    if plan.next_tools is not None:
        yield "The shape allows:"
        for clause in describe_next_tools(plan.next_tools):
            yield f"  {clause}"


def _tokens(vocabulary: VocabularyPlan) -> str:
    """Return the number of tokens kept, or that it is not known yet."""
    each = f"each takes {plural(vocabulary.parameters_of_token, 'parameter')}"
    if vocabulary.kept is None:
        return f"the run counts the tokens of its text; until then the sizes are those of all of them, {each}"
    kept = f"{vocabulary.kept:,} of {plural(vocabulary.tokens, 'token')} kept, {each}"
    if vocabulary.coverage is None:
        return kept
    return f"{kept}; they make up {vocabulary.coverage:.2%} of held-out text, and {vocabulary.required:,} must stay"


def _requirements(plan: Plan) -> Iterator[str]:
    windows, length = plan.calibration
    sources = plan.calibration_sources
    single = f" from {describe_text(sources[0])}" if len(sources) == 1 else ""
    begin = f", each begins with {plan.begin_of_text}" if plan.begin_of_text else ""
    yield f"Calibration: {plural(windows, 'window')} of {plural(length, 'token')}{single}{begin}"
    for source in sources if len(sources) > 1 else ():
        licence = f", {source.licence}" if source.licence else ""
        yield f"  {source.name}: {plural(source.windows, 'window')}, {describe_text(source)}{licence}"
    yield f"Disk: {format_size(plan.disk)} for the result, twice that while it is written"
    if plan.base_files.carried:
        state = "copied unchanged" if plan.vocabulary is None else "copied, with the ids of the tokens that are kept"
        yield f"Files of the base model that are {state}: {describe_carried(plan.base_files)}"
    if plan.base_files.left:
        yield f"Files of the base model that are not copied: {describe_left(plan.base_files)}"


def _recovery_lines(plan: Plan) -> Iterator[str]:
    """Yield the length of the training after the cut, its text, and the memory and disk that it needs."""
    found = plan.recovery
    if found is None:
        return
    if found.tokens is None or found.steps is None:
        length = f"for {found.hours:g} h"
    else:
        length = (
            f"on {format_count(found.tokens)} tokens, in {plural(found.steps, 'step')} of {found.windows_of_step} × "
            f"{found.sequence_length} tokens"
        )
    rounds = f", in {plural(len(plan.rounds), 'round')}" if plan.rounds else ""
    yield (
        f"Recovery: trained {length}{rounds} ({found.method}, {found.loss.replace('_', ' ')}, learning rate up to "
        f"{found.learning_rate:.2g})"
    )
    of_windows = [f"{one.name} {one.windows}" for one in found.sources if one.windows]
    if found.generated:
        of_windows.append(f"{found.generated} that the dense model writes itself")
    if of_windows:
        yield f"  Windows: {', '.join(of_windows)}; {found.held_out} of each source are held out"
    memory, recomputed = found.memory, ", computed again for the gradients" if found.checkpointing else ""
    yield (
        f"  Memory: about {format_size(memory.total)}: weights {format_size(memory.weights)}, gradients and optimiser "
        f"{format_size(memory.optimiser)}, activations of {plural(memory.windows, 'window')} "
        f"{format_size(memory.activations)}{recomputed}; disk about {format_size(found.disk)}"
    )


def _task_lines(plan: Plan) -> Iterator[str]:
    if plan.tasks:
        listed = ", ".join(f"{task.name} ({task.limit or 'all'})" for task in plan.tasks)
        yield f"Tasks, with the maximum number of samples of each: {listed}"


def _device_lines(plan: Plan) -> Iterator[str]:
    """Yield the number of windows in a batch, and for each device what the run plans to keep on it.

    Of several processes each has a share of the main memory.
    """
    chosen = plan.batch_sizes
    held_out = f", of held-out text {chosen.held_out}" if chosen.held_out != chosen.calibration else ""
    batch = min(chosen.calibration, plan.calibration[0])
    yield f"Batches: {plural(batch, 'window')} at a time{held_out}"
    for device in plan.devices:
        computes = device is plan.devices[0] or device.device != "cpu"
        ahead = " and the next one" if device.device != "cpu" else ""
        parts = {
            "embeddings and head": device.outside,
            f"one layer dense and cut{ahead}" if computes else "buffers for layers": device.layers,
            "statistics": device.statistics,
            "a batch": device.activations,
            "hidden states": device.hidden_states,
        }
        listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        resident = f"; layers that stay there {format_size(device.resident)}" if device.resident else ""
        share = f", for each of {plan.processes} processes" if plan.processes > 1 and device.device == "cpu" else ""
        needed, free = format_size(device.working), f"{format_size(device.free)} free"
        amount = f"{needed} of {free}" if device.working <= device.free else f"{needed}, more than the {free}"
        yield f"Memory on {device.device}{share}: about {amount}: {listed}{resident}"


def _time_lines(plan: Plan) -> Iterator[str]:
    """Yield the estimated time of each step, and what the estimate is made of."""
    found = plan.durations
    if found is None or found.dominant is None:
        return
    steps = found.by_step()
    unknown = " and the tasks of the evaluation, whose number of requests is not known yet" if found.unknown else ""
    listed = ", ".join(f"{step} {rough_duration(seconds)}" for step, seconds in steps.items())
    yield (
        f"Time: about {rough_duration(found.total)}{unknown}; {found.dominant} takes longest "
        f"({steps[found.dominant] / found.total:.0%}): {listed}"
    )
    beside = f"; other programs make it {found.slowdown:.1f} times as long" if found.slowdown >= _BUSY else ""
    among = "one process" if found.processes == 1 else f"{found.processes} processes"
    yield (
        f"The time is an estimate, from the operations of each step and the measured speed of {found.device} "
        f"({format_count(found.rates.products)} operations/s), for {among} and files in the page cache{beside}"
    )
