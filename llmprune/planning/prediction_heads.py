"""Plan the decision on the base's prediction heads: kept, narrowed or left out."""

from __future__ import annotations

from dataclasses import replace

from llmprune.anatomy.config_edits import count_heads_again, declared_heads
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.checkpoint.head_tensors import find_head_tensors
from llmprune.checkpoint.location import folder_of
from llmprune.checkpoint.result.config_file import ConfigChange
from llmprune.cut.apply import cut_config
from llmprune.cut.prediction_heads import HeadsDecision, decide_heads
from llmprune.planning.base import Base
from llmprune.planning.plan_schema import Plan
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.prediction_heads import PredictionHeads
from llmprune.results.sentences.prediction_heads import describe_declared, describe_prediction_heads


def with_prediction_heads(plan: Plan, base: Base, *, recipe: Recipe, planned: PlannedCut) -> Plan:
    """Return a plan with the decision on the prediction heads, a note on it, and their bytes on the disk.

    Where the base's files are not known, the note is on the heads that its config declares.
    """
    decision = _decision(recipe, base, planned=planned) if base.headers else None
    if decision is None:
        return plan.model_copy(update={"notes": (*plan.notes, *about_declared(base))})
    heads = head_figures(decision, declared_heads(base.config.to_dict()))
    notes = (*plan.notes, describe_prediction_heads(heads))
    disk = plan.disk + (heads.bytes if decision.kept else 0)
    return plan.model_copy(update={"prediction_heads": heads, "notes": notes, "disk": disk})


def about_declared(base: Base) -> list[str]:
    """Return a note on heads that the config declares, where the decision on them is still open.

    Models with code of their own may load theirs.
    """
    fields = () if base.config.is_custom_code() else declared_heads(base.config.to_dict())
    if not fields:
        return []
    if base.headers and find_head_tensors(base.names) is None:
        return [f"{describe_declared(fields)} are not in its files; the result's config declares none"]
    return [f"{describe_declared(fields)} are kept if the files have them and their layers can follow the cut"]


def head_figures(decision: HeadsDecision, fields: tuple[str, ...]) -> PredictionHeads:
    """Return a decision as figures. ``fields``: of the base's config that declare the heads."""
    return PredictionHeads(
        fields=fields,
        tensors=len(decision.tensors.names),
        bytes=decision.tensors.bytes,
        narrowed=bool(decision.layers) and decision.kept,
        reason=decision.reason,
    )


def _decision(recipe: Recipe, base: Base, *, planned: PlannedCut) -> HeadsDecision | None:
    before, kept, dense = base.config, planned.sizes, KeptSizes.of_dense(base.anatomy)
    after = cut_config(before, base.anatomy, kept=kept)
    change = ConfigChange(
        folder_of(recipe.model, "config"),
        before,
        count_heads_again(after, before),
        planned.layers,
        recipe.model.trust_remote_code,
        heads=True,
    )
    narrowed = replace(kept.completed(base.anatomy), layers=dense.layers) != dense
    return decide_heads(base.names, change=change, narrowed=narrowed, keep=recipe.export.prediction_heads == "keep")
