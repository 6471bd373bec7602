"""Notes on matrices that stay dense."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.anatomy.types import Anatomy
from llmprune.planning.sparsity import SparsityPlan


def about_sparsity(sparsity: SparsityPlan | None, pruned: PreTrainedModel, *, anatomy: Anatomy) -> list[str]:
    """Return notes on the matrices that stay dense."""
    if sparsity is None:
        return []
    return [f"stays dense: {skipped}" for skipped in sparsity.skipped] + _about_dense_experts(pruned, anatomy)


def _about_dense_experts(pruned: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """Return a note on stacked experts, where it is not known which tokens each of them gets."""
    if anatomy.experts is None or anatomy.experts.refusal is None:
        return []
    stacked = sorted(
        {name for layer in find_layers(pruned)[1] for name, tensor in layer.named_parameters() if tensor.ndim == 3}
    )
    reason = "it is not known which tokens each expert gets"
    return [f"stays dense, because {reason}: {', '.join(stacked)}"] if stacked else []
