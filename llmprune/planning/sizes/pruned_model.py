"""The pruned model of a plan, without its weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmprune.anatomy.layer_equivalence import check_layer_equivalence, sizes_that_change
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.checkpoint.result.base_files import require_expressible
from llmprune.cut.apply import cut_config
from llmprune.planning.base import Base
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.recipe.recipe import Recipe


def pruned_meta_model(recipe: Recipe, base: Base, *, planned: PlannedCut) -> PreTrainedModel:
    """Build the pruned model without weights, and check that its layers are those of the dense model but for the cut.

    Raises ModelError where no config, or not the base's own config file, can express the cut.
    """
    kept = planned.sizes
    config = cut_config(base.config, base.anatomy, kept=kept)
    if base.has_files:
        require_expressible(recipe.model, base.config, after=config, layers=kept.layers)
    pruned = build_meta_model(config, base.dense.dtype, trust_remote_code=recipe.model.trust_remote_code)
    changing = sizes_that_change(base.anatomy, kept)
    check_layer_equivalence(base.dense, pruned, keep=kept.layers, changing=changing)
    return pruned
