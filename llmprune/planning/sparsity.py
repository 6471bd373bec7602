"""Plan which matrices of the cut layers get the sparsity pattern."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from llmprune.anatomy.projections import projections_of
from llmprune.common.errors import RecipeError
from llmprune.recipe.sparsity import Sparsity, select
from llmprune.results.formatting import ranges


@dataclass(frozen=True)
class SparsityPlan:
    """Number of matrices that get the pattern, of their weights and of the zeros among these.

    ``skipped``: matrices that the recipe selects and that cannot have the pattern, each with the reason.
    """

    pattern: str
    matrices: int
    weights: int
    zeros: int
    skipped: tuple[str, ...]


def planned_sparsity(
    sparsity: Sparsity | None,
    layers: Iterable[nn.Module],
    *,
    experts: int | None,
    calibration: tuple[int, int],
    refit: bool,
) -> SparsityPlan | None:
    """Select the matrices that get the pattern in the layers of the pruned model.

    ``experts``: kept in each mixture; ``calibration``: windows and their length; ``refit``: True where the run refits.
    Raises RecipeError where no matrix is selected, or where the calibration text is too short.
    """
    if sparsity is None:
        return None
    found = [(index, projections_of(layer)) for index, layer in enumerate(layers)]
    selections = {index: select(projections, sparsity, experts=experts) for index, projections in found}
    names = sorted({one.name for _, projections in found for one in projections})
    if unmatched := sparsity.unmatched(names):
        raise RecipeError(
            f"sparsity: {', '.join(map(repr, unmatched))} matches no matrix of this model's layers; they have "
            f"{', '.join(names)}"
        )
    chosen = [one for selection in selections.values() for one in selection.chosen]
    refused: dict[str, list[int]] = {}
    for index, selection in selections.items():
        for name, reason in selection.skipped.items():
            refused.setdefault(f"{name}: {reason}", []).append(index)
    if not chosen:
        reasons = "; ".join(refused) or "targets and skip select none"
        raise RecipeError(f"sparsity: no matrix of this model can have the pattern {sparsity.parsed}: {reasons}")
    if sparsity.required_moments(refit) == "gram":
        _require_tokens(max(one.inputs for one in chosen), calibration)
    weights = sum(one.outputs * one.inputs for one in chosen)
    zeros = sum(one.outputs * (one.inputs - sparsity.parsed.kept_inputs(one.inputs)) for one in chosen)
    skipped = tuple(f"{reason} (in layers {ranges(where)})" for reason, where in refused.items())
    return SparsityPlan(str(sparsity.parsed), len(chosen), weights, zeros, skipped)


def _require_tokens(inputs: int, calibration: tuple[int, int]) -> None:
    windows, length = calibration
    if windows * length < inputs:
        raise RecipeError(
            f"calibration.samples: {windows * length:,} tokens are too few for the Gram matrix of {inputs:,} inputs, "
            f"which is singular with fewer than {inputs:,} tokens and stable with about ten times as many; take at "
            f"least {-(-inputs // length)} windows of {length} tokens, better {-(-10 * inputs // length)}, or choose "
            "sparsity.method wanda or magnitude without a refit"
        )
