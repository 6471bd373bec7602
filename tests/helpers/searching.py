"""Handmade figures of a search under a budget, for SmolLM2-135M."""

from __future__ import annotations

import math
from typing import Any

from llmprune.cut.shape import Shape
from llmprune.results.figures.search import ChosenShape, SearchFigures, TriedShape

SOURCES = ("web", "code", "maths")
WIDTH, GROUPS, LAYERS = 1536, 3, 30
_ORDER = (7, 17, 16, 18, 4, 5, 26, 14, 3, 21, 20, 12)
_EMBEDDINGS, _MLP, _GROUP, _NORMS = 28_312_128, 1_728, 294_912, 1_152  # parameters


def parameters(layers: int, neurons: int, groups: int) -> int:
    """Return the parameters of SmolLM2 in this shape."""
    return _EMBEDDINGS + layers * (_MLP * neurons + _GROUP * groups + _NORMS)


def tried(layers: int, neurons: int, groups: int, **changes: Any) -> TriedShape:
    """Return a shape of SmolLM2, whose divergence grows with everything that it lacks; a repair halves it."""
    repaired = changes.get("repaired", False)
    lost = (
        0.055 * (LAYERS - layers) ** 1.25
        + 1.9 * ((WIDTH - neurons) / WIDTH) ** 1.4
        + 0.62 * ((GROUPS - groups) / GROUPS) ** 1.2
    )
    scale = 0.55 if repaired else 1.0
    divergence = {name: round(scale * lost * share, 4) for name, share in zip(SOURCES, (0.82, 1.23, 0.95), strict=True)}
    count = parameters(layers, neurons, groups)
    values: dict[str, Any] = {
        "name": Shape(layers, (("intermediate_size", neurons),), groups).name,
        "layers": layers,
        "removed": tuple(sorted(_ORDER[: LAYERS - layers])),
        "widths": {"intermediate_size": neurons},
        "kv_groups": groups,
        "experts": None,
        "parameters": count,
        "active_parameters": count,
        "bytes": 2 * count,
        "kv_bytes_per_token": 256 * layers * groups,
        "divergence": divergence,
        "score": sum(divergence.values()) / len(divergence),
        "scores": (lost, 0.58 * lost, 0.55 * lost) if repaired else (lost,),
        "repaired": repaired,
    }
    values |= changes
    return TriedShape(**values | {"scores": (*values["scores"][:-1], values["score"])})


def tried_for(share: float, size: int = 0, **changes: Any) -> tuple[TriedShape, ...]:
    """Return the shapes of a search for a share of the parameters; the best four, and those one step on, are repaired.

    ``size``: index of the budget. ``changes``: to every shape.
    """
    limit = share * parameters(LAYERS, WIDTH, GROUPS)
    shapes = []
    for groups in (3, 2):
        for layers in range(LAYERS, 15, -1):
            room = (limit - _EMBEDDINGS) / layers - _GROUP * groups - _NORMS
            neurons = min(int(room / _MLP) // 64 * 64, WIDTH)
            if neurons >= 640 and parameters(layers, neurons, groups) >= 0.97 * limit:
                shapes.append((layers, neurons, groups))
    found = sorted((tried(*shape, size=size, **changes) for shape in shapes), key=lambda one: one.score)
    best = found[:4]
    repaired = [tried(*_sizes(one), size=size, repaired=True, **changes) for one in best]
    layers, neurons, groups = _sizes(best[0])
    beyond = {
        "layers": (layers - 1, neurons, groups),
        "mlp": (layers, neurons - 64, groups),
        "heads": (layers, neurons, groups - 1),
    }
    further = [
        tried(*shape, size=size, repaired=True, further=axis, **changes)
        for axis, shape in beyond.items()
        if shape[2] > 0
    ]
    return (*repaired, *found[4:], *further)


def _sizes(one: TriedShape) -> tuple[int, int, int]:
    return one.layers, one.widths["intermediate_size"], one.kv_groups or 0


def searched(*shares: float, **changes: Any) -> SearchFigures:
    """Return the search for one budget, or for a family of them; without shares, for three quarters."""
    shares = shares or (0.75,)
    shapes = tuple(one for size, share in enumerate(shares) for one in tried_for(share, size))
    dense = parameters(LAYERS, WIDTH, GROUPS)
    chosen = []
    for size, share in enumerate(shares):
        own = [one for one in shapes if one.size == size and one.further is None]
        best = min((one for one in own if one.repaired), key=lambda one: one.score)
        chosen.append(
            ChosenShape(name=best.name, limits={"parameters": math.floor(share * dense)}, candidates=61, tried=len(own))
        )
    values: dict[str, Any] = {
        "dense_parameters": dense,
        "dense_bytes": 2 * dense,
        "dense_layers": LAYERS,
        "dense_widths": {"intermediate_size": WIDTH},
        "dense_kv_groups": GROUPS,
        "tried": shapes,
        "chosen": tuple(chosen),
        "order": _ORDER,
        "sources": SOURCES,
        "windows": 48,
        "tokens": 12_288,
        "forward_passes": 6.4,
        "seconds": 754.0,
    }
    return SearchFigures(**values | changes)


def with_broken(found: SearchFigures, place: int = -6, source: str = "code") -> SearchFigures:
    """Return the figures with one shape that a source finds broken."""
    shapes = list(found.tried)
    one = shapes[place]
    divergence = one.divergence | {source: 4.9}
    mean = sum(divergence.values()) / len(divergence)
    shapes[place] = one.model_copy(
        update={"divergence": divergence, "score": mean, "scores": (*one.scores[:-1], mean), "broken": source}
    )
    return found.model_copy(update={"tried": tuple(shapes)})


def with_speed(found: SearchFigures, measured: float = 1.24) -> SearchFigures:
    """Return the figures of a budget with a speed: predicted for each shape, and measured for the chosen one."""
    shapes = tuple(
        one.model_copy(update={"speed": round((found.dense_parameters / one.parameters) ** 1.1, 3)})
        for one in found.tried
    )
    chosen = tuple(
        one.model_copy(update={"limits": one.limits | {"speed": 1.2}, "measured_speed": measured})
        for one in found.chosen
    )
    return found.model_copy(update={"tried": shapes, "chosen": chosen})
