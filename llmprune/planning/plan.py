"""What can be known before a weight is read: sizes, memory, and every refusal.

Counts come from the model's own code built on the meta device, not from formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.layer_equivalence import check_layer_equivalence, sizes_that_change
from llmprune.anatomy.meta_model import Config, build_meta_model, find_layers
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.base_files import planned_companions, require_expressible
from llmprune.checkpoint.loading import compute_dtype, headers_of, load_config, raw_config
from llmprune.checkpoint.stored_dtypes import FileNames, describe_types, kept_dtypes, require_all
from llmprune.checkpoint.unsupported import require_language_model
from llmprune.checkpoint.weight_headers import Headers
from llmprune.common.errors import RecipeError
from llmprune.common.hub.client import resolve_revision
from llmprune.cut.apply import cut_config
from llmprune.planning.checks import Collected, run_checks
from llmprune.planning.inputs import Inputs
from llmprune.planning.interop import about_head_size, about_layer_count
from llmprune.planning.memory import Memory, bytes_of, bytes_of_window, memory_of
from llmprune.planning.model_size import measure_size
from llmprune.planning.notes import (
    about_base,
    about_refit,
    about_scores,
    about_sparsity,
    about_unread_weights,
    require_room_for_trail,
)
from llmprune.planning.rounding import wishes_without_effect
from llmprune.planning.sizes import planned_experts, planned_heads, planned_layers, planned_widths
from llmprune.planning.sparsity import SparsityPlan, planned_sparsity
from llmprune.recipe.depth import Depth
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures import Figures
from llmprune.results.schema import BaseFiles, Size


class Plan(Figures):
    """What a run will do, and what it needs."""

    model: str
    model_type: str
    dtype: str
    dense: Size
    pruned: Size
    parameters_exact: bool  # False where layers differ in size and the scores decide which go
    removed_layers: tuple[int, ...] | None  # None where the scores decide
    keep_layers: int
    keep_widths: dict[str, int]  # by config field
    keep_experts: int | None
    keep_kv_groups: int | None  # of attention heads, in each layer
    sparsity: SparsityPlan | None = None
    calibration: tuple[int, int]  # windows, tokens in each
    memory: Memory
    disk: int  # bytes of the result
    base_files: BaseFiles = BaseFiles()
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """All that is known of a recipe before weights are read. Without a plan there is at least one problem."""

    plan: Plan | None
    anatomy: Anatomy | None
    inputs: Inputs
    collected: Collected

    def require(self, source: str = "") -> tuple[Plan, Anatomy]:
        """Return plan and anatomy. Raises LLMPruneError that lists every problem."""
        self.collected.raise_all(source)
        assert self.plan is not None, "it was made or a problem says why not"
        assert self.anatomy is not None, "as the plan"
        return self.plan, self.anatomy


def make_plan(recipe: Recipe) -> Plan:
    """Plan a recipe without reading weights. Raises LLMPruneError for all that a run would refuse."""
    return survey(recipe).require()[0]


def survey(recipe: Recipe, *, wrong: Iterable[str] = (), problems: Iterable[str] = ()) -> Survey:
    """Plan a recipe and go through every check, whatever the earlier ones found.

    ``wrong``: keys that were left out of the recipe because they are wrong, and what is wrong with them.
    """
    resolve_revision.cache_clear()
    collected = Collected(wrong, problems)
    inputs = Inputs(recipe)
    plan, anatomy = plan_structure(recipe, collected)
    run_checks(inputs, collected)
    return Survey(plan, anatomy, inputs, collected)


def plan_structure(recipe: Recipe, collected: Collected) -> tuple[Plan | None, Anatomy | None]:
    """The plan from the config alone, and the anatomy that was found on the way; None where a problem was collected."""
    model = ("model",)
    _, config = collected.attempt("model", model, work=lambda: load_config(recipe.model))
    if config is None:
        collected.wrong += model  # every check that needs the config would say the same again
        return None, None
    _, base = collected.attempt("model", model, work=lambda: _described(recipe, config))
    if base is None:
        return None, None
    complete, _ = collected.attempt("model", model, work=lambda: _require_whole(recipe, base))
    targets = _targets(recipe, base.anatomy, collected=collected)
    if targets is None or not complete:
        return None, base.anatomy
    reads = ("model", "depth", "width", "experts", "sparsity", "refit", "calibration")
    return collected.attempt("model", reads, work=lambda: _plan(recipe, base, targets=targets))[1], base.anatomy


@dataclass(frozen=True)
class _Base:
    """The dense model, as far as it is known without its weights. ``headers``: of its files, None where unknown."""

    config: Config
    headers: Headers | None
    dense: PreTrainedModel
    anatomy: Anatomy

    @cached_property
    def names(self) -> FileNames:
        """Which tensors of the files make each of the model's."""
        return FileNames(self.dense, self.headers or {})


def _described(recipe: Recipe, config: Config) -> _Base:
    headers, trust = headers_of(recipe.model), recipe.model.trust_remote_code
    require_language_model(recipe.model, headers)
    anatomy = discover(config, trust)
    return _Base(
        config,
        headers,
        build_meta_model(config, compute_dtype(recipe.model, config, found=headers), trust_remote_code=trust),
        anatomy,
    )


def _require_whole(recipe: Recipe, base: _Base) -> None:
    """Raise CheckpointError where the files do not have the tensors of the model."""
    if base.headers:
        require_all(base.names, recipe.model.id)


@dataclass(frozen=True)
class _Targets:
    """What stays of each kind of unit."""

    layers: tuple[int, ...]
    widths: dict[str, int]
    experts: int | None
    kv_groups: int | None
    notes: tuple[str, ...]


def _targets(recipe: Recipe, anatomy: Anatomy, *, collected: Collected) -> _Targets | None:
    """What stays; None where a problem was collected."""
    notes: list[str] = []
    model = "model"
    layers, keep = collected.attempt("depth", ("depth", model), work=lambda: planned_layers(recipe.depth, anatomy))
    neurons, widths = collected.attempt(
        "width", ("width", model), work=lambda: planned_widths(recipe.width, anatomy, notes=notes)
    )
    mixtures, experts = collected.attempt(
        "experts", ("experts", model), work=lambda: planned_experts(recipe.experts, anatomy)
    )
    heads, kv_groups = collected.attempt(
        "width.heads", ("width", model), work=lambda: planned_heads(recipe.width, anatomy, notes=notes)
    )
    if not (layers and neurons and mixtures and heads):
        return None
    assert keep is not None, "planned"
    assert widths is not None, "planned"
    return _Targets(tuple(keep), widths, experts, kv_groups, tuple(notes))


def _plan(recipe: Recipe, base: _Base, *, targets: _Targets) -> Plan:
    """The plan from the config and what stays. Raises ModelError and RecipeError for what cannot be done."""
    config, dense, anatomy = base.config, base.dense, base.anatomy
    notes, keep, widths = list(targets.notes), targets.layers, targets.widths
    experts, kv_groups = targets.experts, targets.kv_groups
    dtype = dense.dtype
    cut = cut_config(config, anatomy, layers=keep, widths=widths, num_experts=experts, kv_groups=kv_groups)
    require_expressible(recipe.model, config, after=cut, layers=keep)
    pruned = build_meta_model(cut, dtype, trust_remote_code=recipe.model.trust_remote_code)
    check_layer_equivalence(
        dense, pruned, keep=keep, changing=sizes_that_change(anatomy, widths, experts=experts, kv_groups=kv_groups)
    )
    sparsity = planned_sparsity(
        recipe.sparsity,
        find_layers(pruned)[1],
        experts=experts,
        calibration=recipe.calibration.shape(),
        refit=recipe.refit is not None,
    )
    idle = wishes_without_effect(recipe, anatomy, widths=widths, kv_groups=kv_groups, sparsity=sparsity)
    if idle and bytes_of(dense) == bytes_of(pruned) and not (sparsity and sparsity.zeros):
        raise RecipeError(idle)
    notes += idle
    notes += _about_types(recipe, base)
    exact = _exact(recipe.depth, dense)
    if not exact:
        notes.append("layers differ in size: the sizes are those of a cut from the middle, until the scores are known")
    notes += about_sparsity(sparsity, pruned) + _about_cut(recipe, base, targets=targets, pruned=pruned)
    require_room_for_trail(recipe, anatomy.num_layers * bytes_of_window(recipe, dense) * recipe.calibration.shape()[0])
    companions = planned_companions(recipe.model)
    saved = kept_dtypes(base.names, dtype, keep=recipe.model.dtype == "auto")
    size = measure_size(
        pruned, anatomy.widths | widths, experts=experts, kv_groups=kv_groups, stored=saved, layers=keep
    )
    return Plan(
        model=recipe.model.id,
        model_type=config.model_type,
        dtype=_name_of(dtype),
        dense=measure_size(
            dense,
            anatomy.widths,
            experts=anatomy.experts.count if anatomy.experts else None,
            kv_groups=anatomy.heads.count if anatomy.heads else None,
            stored=base.names.dtypes,
        ),
        pruned=size,
        parameters_exact=exact,
        removed_layers=recipe.depth.layers if recipe.depth else (),
        keep_layers=len(keep),
        keep_widths=widths,
        keep_experts=experts,
        keep_kv_groups=kv_groups,
        sparsity=sparsity,
        calibration=recipe.calibration.shape(),
        memory=memory_of(recipe, dense, pruned=pruned, anatomy=anatomy, widths=widths),
        disk=size.bytes,
        base_files=BaseFiles(carried=companions.carried, left=companions.left),
        notes=tuple(notes),
    )


def _about_cut(recipe: Recipe, base: _Base, *, targets: _Targets, pruned: PreTrainedModel) -> list[str]:
    """Say what the refit and the scores cost and assume, and what other tools derive from sizes that change."""
    config, anatomy = base.config, base.anatomy
    raw = raw_config(recipe.model) or config.to_dict()
    return [
        *about_refit(recipe, anatomy, widths=targets.widths),
        *about_scores(recipe, anatomy, keep=targets.layers),
        *about_layer_count(base.dense, pruned),
        *about_head_size(config, raw, heads=anatomy.heads, kept=targets.kv_groups),
        *about_base(recipe, config),
    ]


def _about_types(recipe: Recipe, base: _Base) -> list[str]:
    """Say which types the result has."""
    dtype = base.dense.dtype
    if base.headers:
        return describe_types(base.names, dtype, keep=recipe.model.dtype == "auto")
    return [about_unread_weights(recipe, _name_of(dtype), none=base.headers is not None)]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exact(depth: Depth | None, dense: PreTrainedModel) -> bool:
    _, layers = find_layers(dense)
    sizes = {sum(parameter.numel() for parameter in layer.parameters()) for layer in layers}
    return depth is None or depth.layers is not None or len(sizes) == 1
