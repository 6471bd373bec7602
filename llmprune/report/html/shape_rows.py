"""Tried shapes of a search as rows of text for a table on a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.formatting import count, fixed, percent, share, times
from llmprune.results.sentences.search import AXES


@dataclass(frozen=True)
class ShapeRow:
    """A shape as text. ``chosen``: for its budget; ``link``: an address for it, where there is one."""

    name: str
    cells: tuple[str, ...]
    remark: str
    chosen: bool
    broken: bool
    link: str | None = None


@dataclass(frozen=True)
class ShapeTable:
    """Heads of the columns between name and remark, and the rows."""

    heads: tuple[str, ...]
    rows: tuple[ShapeRow, ...]


def shape_table(
    found: SearchFigures, shapes: Sequence[TriedShape], *, link: Callable[[TriedShape], str] | None = None
) -> ShapeTable:
    """Return size, speed where it is known, score, and the divergence by source, where there are several."""
    timed = any(one.speed is not None for one in shapes)
    sources = found.sources if len(found.sources) > 1 else ()
    mixed = len({one.repaired for one in shapes}) > 1
    rows = []
    for one in shapes:
        cells = [count(one.parameters), percent(share(found.dense_parameters, one.parameters))]
        cells += [times(one.speed)] if timed else []
        cells += [fixed(one.score), *(fixed(one.divergence.get(source)) for source in sources)]
        is_chosen = any((one.name, one.size) == (best.name, size) for size, best in enumerate(found.chosen))
        address = None if link is None else link(one)
        rows.append(
            ShapeRow(
                one.name,
                tuple(cells),
                _remark(one, is_chosen=is_chosen, mixed=mixed),
                is_chosen,
                one.broken is not None,
                address,
            )
        )
    heads = ("parameters", "of dense", *(["speed"] if timed else []), "score", *(f"KL {source}" for source in sources))
    return ShapeTable(heads, tuple(rows))


def _remark(one: TriedShape, *, is_chosen: bool, mixed: bool) -> str:
    parts = ["chosen"] if is_chosen else []
    parts += [f"broken on {one.broken}"] if one.broken else []
    parts += [f"further: {AXES[one.further]}"] if one.further else []
    parts += ["as cut"] if mixed and not one.repaired else []
    return ", ".join(parts)
