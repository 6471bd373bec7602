"""Anatomy of a model as a table for the terminal."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.anatomy.layer_kinds import group_size, kinds_of, starts_of_spans
from llmprune.anatomy.types import Anatomy, Unit
from llmprune.results.formatting import plural, ranges


def print_anatomy(model: str, anatomy: Anatomy, *, console: Console) -> None:
    """Print layers, heads, MLP units by the config field of their width, experts, and each refusal with its reason."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    classes = Counter(anatomy.layer_classes)
    kinds = ", ".join(f"{count} × {name}" for name, count in classes.items())
    table.add_row("layers", f"{anatomy.layers_path}: {kinds}")
    for pattern in anatomy.patterns:
        table.add_row("layer pattern", f"{pattern.name} repeats every {pattern.period} layers")
    _add_heads(table, anatomy)
    _add_widths(table, anatomy)
    if anatomy.experts:
        mixtures = sum(block is not None for block in anatomy.blocks)
        chosen = f", {anatomy.experts.top_k} for each token" if anatomy.experts.top_k else ""
        where = f" in {plural(mixtures, 'layer')}, set by {anatomy.experts.field}" if mixtures else ""
        grouped = f" in {anatomy.experts.groups} groups" if anatomy.experts.groups > 1 else ""
        table.add_row("experts", f"{anatomy.experts.count}{grouped}{chosen}{where}")
    if anatomy.hidden and anatomy.hidden.refusal is None:
        table.add_row("hidden size", f"{anatomy.hidden.size}, set by {anatomy.hidden.field}")
        fixed = "".join(f"; {name} is set to {value}" for name, value in anatomy.hidden.fixed.items())
        step = anatomy.hidden.possible[0]
        table.add_row("", f"its config accepts the multiples of {step}{fixed}; proven by cutting and masking")
    console.print(Text(f"{model} ({anatomy.model_type})", style="bold"))
    console.print()
    console.print(table)
    console.print()
    verdicts = [("Depth", anatomy.depth_refusal), ("Width", anatomy.width_refusal)]
    if anatomy.heads:
        verdicts.append(("Heads", anatomy.heads.refusal))
    if anatomy.hidden:
        verdicts.append(("Hidden size", anatomy.hidden.refusal))
    if anatomy.experts:
        verdicts.append(("Experts", anatomy.experts.refusal))
    for kind, refusal in verdicts:
        possible = f"can be cut{_by_index(anatomy) if kind == 'Depth' else ''}"
        verdict = Text(possible, "green") if refusal is None else Text(f"cannot be cut: {refusal}", "red")
        console.print(Text.assemble((f"{kind}: ", "bold"), verdict))


def _by_index(anatomy: Anatomy) -> str:
    """Return which layers can be removed; an empty text where any can."""
    if not anatomy.by_index:
        return ""
    kinds = kinds_of(anatomy.by_index, anatomy.num_layers)
    size, names = group_size(kinds), ", ".join(one.name for one in anatomy.by_index)
    layers = "the last layers alone"
    if size == 1:
        layers = f"any of layers {ranges(starts_of_spans(kinds, 1))}"
    elif size:
        layers = f"{size} consecutive layers together, or the last ones"
    return f": {layers}; the kind of a layer follows from its index ({names})"


def _add_heads(table: Table, anatomy: Anatomy) -> None:
    heads = anatomy.heads
    if heads is None:
        return
    groups = f" in {heads.count} key-value groups of {heads.queries}" if heads.queries > 1 else ""
    table.add_row("attention heads", f"{heads.count * heads.queries}{groups}, set by {' and '.join(heads.per_group)}")
    if heads.refusal is None:
        fixed = "".join(f"; {name} is set to {value}" for name, value in heads.fixed.items())
        table.add_row("", f"its config also accepts {ranges(heads.possible)} groups{fixed}")
    for unit, layers in Counter(unit for unit in anatomy.attention if unit).items():
        where = f"{plural(layers, 'layer')} ({unit.path})"
        table.add_row("", f"in {where}, proven by cutting and masking: {_tensors(unit)}")


def _add_widths(table: Table, anatomy: Anatomy) -> None:
    units = Counter(unit for units in anatomy.units for unit in units)
    for group in anatomy.groups:
        if group.refusal:
            table.add_row("MLP neurons", f"{group.width}, set by {group.field}, cannot be cut: {group.refusal}")
        for unit, layers in units.items():
            if unit.field == group.field:
                each = f" in each of {unit.experts} experts" if unit.experts else ""
                place = unit.path or "in the layer itself"
                where = f"{plural(layers, 'layer')} ({place})"
                table.add_row("MLP neurons", f"{unit.width}{each} in {where}, set by {unit.field}")
                table.add_row(
                    "", f"proven by cutting and masking: {_tensors(unit)}" + ("" if unit.refit else "; no refit")
                )


def _tensors(unit: Unit) -> str:
    return ", ".join(
        f"{cut.name}[{cut.dim}]" + ("" if cut.parts == (1,) else f" by {' + '.join(map(str, cut.parts))}")
        for cut in unit.tensors
    )
