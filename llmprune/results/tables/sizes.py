"""Size of the dense and the pruned model as rows of text, for tables, pages and model cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmprune.results.figures.model_size import Size
from llmprune.results.formatting import byte_size, change, count, number, percent, share


@dataclass(frozen=True)
class SizeRow:
    """One measure of size as text."""

    label: str
    dense: str
    pruned: str
    of_dense: str  # pruned / dense
    change: str  # difference relative to dense


def size_rows(dense: Size, pruned: Size) -> tuple[SizeRow, ...]:
    """Return a row for every measure that is known of either model; heads and hidden size only if they differ."""
    heads = (dense.kv_groups, pruned.kv_groups) if dense.kv_groups != pruned.kv_groups else (None, None)
    channels = (dense.hidden, pruned.hidden) if dense.hidden != pruned.hidden else (None, None)
    rows: list[tuple[str, int | None, int | None, Callable[[float | None], str]]] = [
        ("parameters", dense.parameters, pruned.parameters, count),
        ("weights", dense.bytes, pruned.bytes, byte_size),
        ("layers", dense.layers, pruned.layers, number),
        ("hidden size", *channels, number),
        *(
            (name, dense.widths[field], pruned.widths.get(field), number)
            for field, name in width_names(dense.widths).items()
        ),
        ("experts", dense.experts, pruned.experts, number),
        ("key-value heads", *heads, number),
        ("tokens", dense.vocabulary, pruned.vocabulary, number),
        ("KV cache per token", dense.kv_bytes_per_token, pruned.kv_bytes_per_token, byte_size),
    ]
    return tuple(
        SizeRow(label, write(before), write(after), percent(share(before, after)), change(before, after))
        for label, before, after, write in rows
        if before is not None or after is not None
    )


def width_names(widths: Mapping[str, int]) -> dict[str, str]:
    """Return a label for each width by its config field: ``MLP width`` if there is one, else the fields' names."""
    return dict.fromkeys(widths, "MLP width") if len(widths) == 1 else {field: field for field in widths}
