"""The pruned model of a plan, without its weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmprune.anatomy.layer_equivalence import check_layer_equivalence, sizes_that_change
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.checkpoint.base_files import require_expressible
from llmprune.cut.apply import cut_config, narrow_config
from llmprune.planning.base import Base
from llmprune.planning.planned_sizes import PlannedCut
from llmprune.recipe.recipe import Recipe


def pruned_meta_model(recipe: Recipe, base: Base, *, planned: PlannedCut) -> PreTrainedModel:
    """Build the pruned model without weights, and check that its layers are those of the dense model but for the cut.

    Raises ModelError where no config, or not the base's own config file, can express the cut.
    """
    keep, widths, kv_groups = planned.layers, planned.widths.kept, planned.heads.kv_groups
    config = cut_config(
        base.config, base.anatomy, layers=keep, widths=widths, num_experts=planned.experts, kv_groups=kv_groups
    )
    config = narrow_config(config, base.anatomy, hidden_size=planned.hidden.size)
    if base.has_files:
        require_expressible(recipe.model, base.config, after=config, layers=keep)
    pruned = build_meta_model(config, base.dense.dtype, trust_remote_code=recipe.model.trust_remote_code)
    changing = sizes_that_change(
        base.anatomy, widths, experts=planned.experts, kv_groups=kv_groups, hidden_size=planned.hidden.size
    )
    check_layer_equivalence(base.dense, pruned, keep=keep, changing=changing)
    return pruned
