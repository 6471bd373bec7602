"""Provenance of a pushed model as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.publish.provenance import Record
from llmprune.results.formatting import byte_size, count, fixed, percent, plural, ranges


def print_record(
    place: str, commit: str, *, record: Record, differing: Mapping[str, str] | None, console: Console
) -> None:
    """Print the record of a pushed model. ``differing``: files that differ from it; None if they were not checked."""
    table = Table(box=None, show_header=False, pad_edge=False, show_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(record):
        table.add_row(name, Text(value))
    console.print(Text(f"{place} ({commit})" if commit else place, style="bold"))
    console.print()
    console.print(table)
    if tasks := record.report.get("tasks"):
        console.print()
        console.print(_tasks(tasks))
    console.print()
    console.print(Text(record.recipe.rstrip()), soft_wrap=True)
    for override in record.overrides:
        console.print(Text(f"--set {override}"), soft_wrap=True)
    console.print()
    if record.refused:
        console.print(Text.assemble(("Gate not met", "bold red"), f": {record.refused}"))
    if differing:
        for file, difference in differing.items():
            console.print(Text.assemble(("Not as recorded", "bold red"), f": {file} {difference}"))
    elif differing is not None:
        console.print(f"All {plural(len(record.files), 'file')} have the recorded SHA-256.")


def _rows(record: Record) -> list[tuple[str, str]]:
    provenance: dict[str, Any] = record.report.get("provenance") or {}
    sizes = [record.report.get(which) or {} for which in ("dense", "pruned")]
    dense, pruned = sizes
    versions = provenance.get("versions") or {}
    cut, rounds = record.cut, record.report.get("rounds") or ()
    layers: tuple[Any, Any] = cut.get("num_layers"), len(cut.get("keep_layers") or ())
    removed = cut.get("remove_layers") or ()
    if rounds:  # the cut is that of the last
        layers = dense.get("layers"), pruned.get("layers")
        removed = sorted(layer for one in rounds for layer in one.get("removed_layers") or ())
    rows = [
        ("pushed", record.created),
        *([("quantized from", record.quantized_from)] if record.quantized_from else []),
        ("base model", f"{provenance.get('model')} @ {provenance.get('commit') or 'no hub commit'}"),
        ("parameters", f"{count(dense.get('parameters'))} → {count(pruned.get('parameters'))}"),
        ("weights", f"{byte_size(dense.get('bytes'))} → {byte_size(pruned.get('bytes'))}"),
        ("layers", f"{layers[0]} → {layers[1]}"),
        ("removed layers", ranges(removed) or "none"),
        *((name, f"{dense['widths'].get(name)} → {kept}") for name, kept in (cut.get("widths") or {}).items()),
        ("calibration", f"{provenance.get('calibration_tokens')} tokens, {provenance.get('calibration_fingerprint')}"),
        *((f"data set {name}", commit) for name, commit in (provenance.get("datasets") or {}).items()),
        *_search(record.report.get("search")),
        *_recovery(record.report.get("recovery"), rounds=rounds),
        ("mean retention", percent(record.report.get("mean_retention"))),
        ("llmprune", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, str(value)) for name, value in rows]


def _search(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the row of the search for the shape, if there was one."""
    if not found:
        return []
    chosen = found["chosen"][found.get("member") or 0]
    shape = next(
        one for one in found["tried"] if (one["name"], one["size"]) == (chosen["name"], found.get("member") or 0)
    )
    return [
        ("shape searched", f"{shape['name']}, of {chosen['tried']} tried; KL {fixed(shape['mean'])} nats per token")
    ]


def _recovery(found: dict[str, Any] | None, *, rounds: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the row of the training after the cut, if there was one."""
    if not found:
        return []
    tokens = sum(one.get("tokens") or 0 for one in rounds) or found.get("tokens")
    in_rounds = f" in {len(rounds)} rounds, in the last" if rounds else ""
    trained = f"{found.get('method')}, {found.get('loss')}: {count(tokens)} tokens{in_rounds}"
    return [("trained after the cut", f"{trained}, step {found.get('best_step')} of {found.get('steps')} saved")]


def _tasks(tasks: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, head in enumerate(("task", "dense", "pruned", "retention", "samples")):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for task in tasks:
        figures = fixed(task.get("dense")), fixed(task.get("pruned")), percent(task.get("retention"))
        better = "" if task.get("higher_is_better", True) else ", lower is better"
        table.add_row(f"{task.get('task')} ({task.get('metric')}{better})", *figures, str(task.get("samples")))
    return table
