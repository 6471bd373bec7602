"""All notes of a plan, in their order."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmprune.anatomy.layer_kinds import follow_from
from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.location import raw_config
from llmprune.common.errors import RecipeError
from llmprune.cut.layer_choice import required_kinds
from llmprune.planning.base import Base
from llmprune.planning.memory.passes import parameter_bytes
from llmprune.planning.next_tools.tool_compatibility import about_derived_widths, about_head_size, about_layer_count
from llmprune.planning.notes.base_model import about_base
from llmprune.planning.notes.evaluation import about_judgement
from llmprune.planning.notes.recovery import about_recovery
from llmprune.planning.notes.refit import about_refit
from llmprune.planning.notes.scores import about_scores
from llmprune.planning.notes.sparsity import about_sparsity
from llmprune.planning.notes.without_effect import settings_without_effect
from llmprune.planning.reference import about_reference
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.planning.sparsity import SparsityPlan
from llmprune.recipe.depth import Depth
from llmprune.recipe.recipe import Recipe


def notes_of(
    recipe: Recipe, base: Base, *, planned: PlannedCut, pruned: PreTrainedModel, sparsity: SparsityPlan | None
) -> list[str]:
    """Return the notes of a plan. Raises RecipeError where rounding leaves the whole recipe without effect."""
    idle = settings_without_effect(recipe, base.anatomy, planned=planned, sparsity=sparsity)
    is_cut = parameter_bytes(base.dense) != parameter_bytes(pruned) or bool(sparsity and sparsity.zeros)
    if idle and not is_cut:
        raise RecipeError(idle)
    inexact = "layers differ in size: the sizes are those of a cut from the middle, until the scores are known"
    is_copy = not (is_cut or recipe.vocabulary or recipe.recover)
    copied = "nothing is cut, so that the result is the model as it is; give depth, width or another section"
    return [
        *planned.notes,
        *([copied] if is_copy else []),
        *idle,
        *base.about_types(recipe),
        *([] if is_exact(recipe.depth, base) else [inexact]),
        *about_sparsity(sparsity, pruned, anatomy=base.anatomy),
        *_about_cut(recipe, base, planned=planned, pruned=pruned),
        *about_recovery(recipe, is_cut=is_cut),
        *about_reference(recipe),
    ]


def _about_cut(recipe: Recipe, base: Base, *, planned: PlannedCut, pruned: PreTrainedModel) -> list[str]:
    """Return notes on the cost and the assumptions of refit and scores, and on sizes that other tools derive."""
    config, anatomy = base.config, base.anatomy
    raw = raw_config(recipe.model) or config.to_dict()
    return [
        *about_refit(recipe, anatomy, widths=planned.widths.kept),
        *about_scores(recipe, anatomy, keep=planned.layers),
        *about_layer_count(base.dense, pruned),
        *about_head_size(config, raw, heads=anatomy.heads, kept=planned.heads.kv_groups),
        *about_derived_widths(anatomy, planned.widths.kept),
        *about_base(recipe, config),
        *about_judgement(recipe, anatomy, keep=planned.layers),
    ]


def is_exact(depth: Depth | None, base: Base) -> bool:
    """Check that the number of parameters does not depend on which layers the scores choose."""
    if depth is None or depth.layers is not None:
        return True
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in find_layers(base.dense)[1]]
    return follow_from(required_kinds(base.anatomy, keep_pattern=depth.keep_pattern), sizes)
