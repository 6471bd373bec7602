"""A model's anatomy as a person reads it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.anatomy.value import Anatomy


def print_anatomy(model: str, config: Any, anatomy: Anatomy, console: Console) -> None:
    """Print layers, MLP units, heads and experts, and what is refused and why."""
    text = config.get_text_config(decoder=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    classes = Counter(anatomy.layer_classes)
    kinds = ", ".join(f"{count} × {name}" for name, count in classes.items())
    table.add_row("layers", f"{anatomy.layers_path}: {kinds}")
    heads, kv_heads = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if isinstance(heads, int):
        table.add_row("attention heads", f"{heads}" + (f", {kv_heads} for keys and values" if kv_heads else ""))
    experts = next(
        (
            value
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if (value := getattr(text, name, None))
        ),
        None,
    )
    if experts:
        table.add_row("experts", str(experts))
    for unit in dict.fromkeys(unit for units in anatomy.units for unit in units):
        count = sum(unit in units for units in anatomy.units)
        tensors = ", ".join(
            f"{cut.name}[{cut.dim}]" + ("" if cut.layout == "plain" else f" {cut.layout}") for cut in unit.tensors
        )
        table.add_row(
            "MLP neurons",
            f"{unit.width} in {count} layers ({unit.path or 'in the layer itself'}), set by {unit.field}",
        )
        table.add_row("", f"proven by permutation: {tensors}")
    console.print(Text(f"{model} ({anatomy.model_type})", style="bold"))
    console.print()
    console.print(table)
    console.print()
    for what, refusal in (("Depth", anatomy.depth_refusal), ("Width", anatomy.width_refusal)):
        verdict = Text("can be cut", "green") if refusal is None else Text(f"cannot be cut: {refusal}", "red")
        console.print(Text.assemble((f"{what}: ", "bold"), verdict))
