"""Sentences about the cuts that halves, or sources, of the calibration text would choose."""

from __future__ import annotations

from llmprune.results.figures.stability import SourceFigures, StabilityFigures
from llmprune.results.formatting import percent, ranges


def describe_agreement(stability: StabilityFigures) -> list[str]:
    """Return a sentence for each kind of pruned part: how far the cuts of both calibration halves overlap."""
    kinds = {
        "layers": stability.layers,
        "neurons": stability.neurons,
        "attention heads": stability.heads,
        "experts": stability.experts,
    }
    return [
        f"of the {kind} that one half of the calibration text removes, the other half removes {percent(overlap.mean)}"
        + (f" (minimum over layers: {percent(overlap.least)})" if overlap.least < overlap.mean else "")
        + f"; expected by chance: {percent(overlap.by_chance)}"
        for kind, overlap in kinds.items()
        if overlap is not None
    ]


def describe_sources(found: SourceFigures) -> list[str]:
    """Return sentences about what each source of the calibration text alone would keep and remove."""
    kinds = {"neurons": found.neurons, "attention heads": found.heads, "experts": found.experts}
    sentences = []
    for kind, shares in kinds.items():
        known = {layer: share for layer, share in enumerate(shares) if share is not None}
        if known:
            least = min(known, key=known.__getitem__)
            mean = sum(known.values()) / len(known)
            sentences.append(
                f"of the {kind} that are kept, {percent(mean)} would be kept by each source of text alone too "
                f"(minimum: {percent(known[least])}, in layer {least})"
            )
    by_choice: dict[tuple[int, ...], list[str]] = {}
    for name, removed in zip(found.names, found.removed_layers, strict=False):
        by_choice.setdefault(removed, []).append(name)
    if len(by_choice) == 1:
        sentences.append(f"each source alone would remove layers {ranges(*by_choice)}")
    elif by_choice:
        parts = [f"layers {ranges(removed)} by {' and '.join(names)}" for removed, names in by_choice.items()]
        sentences.append(f"removed by one source alone: {', '.join(parts)}")
    return sentences
