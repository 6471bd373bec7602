"""Work of pass 1: the forward pass, the criteria's sums, the backward pass, and ablation."""

from __future__ import annotations

from dataclasses import replace

from llmprune.anatomy.meta_model import text_config
from llmprune.anatomy.types import Unit
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.base import HiddenStateCriterion, WidthCriterion
from llmprune.data.window_sources import sources_of_windows
from llmprune.planning.duration.operations import Work, head_operations, refit_work
from llmprune.planning.duration.parts import (
    Part,
    PlannedModels,
    Tokens,
    forward_work,
    is_cached,
    is_scored,
    visited,
)
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import Refit


def scoring_parts(recipe: Recipe, models: PlannedModels) -> list[Part]:
    """Return the parts of pass 1; none where nothing is scored."""
    depth = recipe.layer_criterion
    if not is_scored(recipe):
        return []
    tokens, anatomy = Tokens.of(recipe, models), models.anatomy
    costs = models.dense_costs(tokens.length)
    layers = len(costs)
    stored = 2 * tokens.count * models.hidden * models.itemsize * layers if is_cached(recipe, models) else 0
    compared = 6 * 4 * models.hidden * tokens.count * layers if isinstance(depth, HiddenStateCriterion) else 0
    forward = forward_work(costs, tokens) + visited(costs) + Work(stream=stored + compared)
    criteria = _unit_scoring(recipe, models, tokens=tokens)
    if recipe.experts:  # each expert is run once more, alone
        runs = 2 if recipe.experts.method == "merge" else 1  # and all of them on some tokens, to compare their outputs
        forward += Work.total(cost.run(tokens.count, tokens.batches, mixer=False) for cost in costs) * runs
    by_gradients = recipe.width is not None and recipe.width.neuron_criterion.forward_criterion is None
    scoring = forward if by_gradients else forward + criteria
    parts = [Part(step="pass 1", name="pass 1: scoring layers", work=scoring, items=layers, shared=True)]
    if recipe.width and (own := recipe.width.windows_for_gradients(tokens.windows, recipe.calibration.generated)):
        parts += _gradient_parts(own, models, tokens=tokens, scoring=criteria)
    if isinstance(depth, AblationCriterion):
        remove = anatomy.num_layers - len(models.planned.layers)
        work = _ablation(depth, models, tokens=tokens, remove=remove)
        parts.append(Part(step="ablation", name="ablation: leaving layers out", work=work, shared=True))
    return parts


def _gradient_parts(windows: int, models: PlannedModels, *, tokens: Tokens, scoring: Work) -> list[Part]:
    """Return the parts of a backward pass over some windows: a forward pass, if it has not all of them, and itself.

    ``scoring``: work of scoring the units on all tokens.
    """
    own = replace(tokens, windows=windows)
    costs, vocabulary = models.dense_costs(tokens.length), text_config(models.dense.config).vocab_size
    parts, layers = [], len(costs)
    if own.windows < tokens.windows:
        stored = Work(stream=2 * own.count * models.hidden * models.itemsize * layers)
        work, name = forward_work(costs, own) + visited(costs) + stored, "pass 1: hidden states for gradients"
        parts.append(Part(step="pass 1", name=name, work=work, items=layers, shared=True))
    head = Work(products=2 * head_operations(models.dense) * own.count, stream=6 * 4 * vocabulary * own.count)
    back = forward_work(costs, own) * 2 + visited(costs) + head + scoring * (own.windows / tokens.windows)
    return [*parts, Part(step="pass 1", name="pass 1: gradients", work=back, items=layers, shared=True)]


def calibration_check_work(recipe: Recipe, models: PlannedModels) -> Work | None:
    """Return the work of the option ``--calibration-check``; None where it has nothing to compute.

    Several sources are scored apart in one more pass 1, unless pass 1 does so already. Of a single source each half of
    the windows is scored, together as much as all of them.
    """
    depth, calibration = recipe.layer_criterion, recipe.calibration
    scores_in_forward = depth is not None and not isinstance(depth, AblationCriterion)
    scores_in_pass1 = bool(recipe.width or recipe.experts or recipe.hidden or scores_in_forward)
    by_source = scores_in_pass1 and max(calibration.read_sources, calibration.scored_sources) > 1
    if not is_scored(recipe) or (by_source and calibration.scored_sources > 1):
        return None
    if by_source:
        recipe = recipe.model_copy(update={"calibration": calibration.model_copy(update={"combine": "rank_mean"})})
    parts = scoring_parts(recipe, models)
    return Work.total(part.work for part in parts if part.work and not (by_source and part.step == "ablation"))


def _unit_scoring(recipe: Recipe, models: PlannedModels, *, tokens: Tokens) -> Work:
    """Return the work of scoring neurons and heads, in addition to the passes."""
    if recipe.width is None:
        return Work()
    anatomy, experts, orders = models.anatomy, models.anatomy.experts, 2 * recipe.calibration.scored_sources
    work, fewest = Work(), _tokens_of_smallest_source(recipe, tokens)
    if recipe.width.cuts_mlp:
        for unit in (unit for units in anatomy.units for unit in units):
            routed = (experts.top_k or experts.count) if unit.experts and experts else 1
            criterion = recipe.width.neuron_criterion
            if unit.experts is None:
                criterion = criterion.for_tokens(fewest)
            work += _scoring_of(criterion, unit, hidden=models.hidden) * (tokens.count * routed)
            work += Work(solves=orders * recipe.width.neuron_criterion.operations(unit.width) * (unit.experts or 1))
    if recipe.width.heads is not None:
        for attention in filter(None, anatomy.attention):
            criterion = recipe.width.head_criterion.for_tokens(fewest)
            work += _scoring_of(criterion, attention, hidden=models.hidden) * tokens.count
            work += Work(solves=orders * recipe.width.head_criterion.operations(attention.width))
    return work


def _tokens_of_smallest_source(recipe: Recipe, tokens: Tokens) -> int:
    """Return the tokens of the smallest of the sources whose sums are kept apart; of one source all."""
    calibration, generated = recipe.calibration, recipe.calibration.generated
    if calibration.combine == "pooled":
        return min(tokens.windows - generated, generated or tokens.windows) * tokens.length
    sources_N = sources_of_windows(calibration) if calibration.scored_sources > 1 else None
    return tokens.count if sources_N is None else int(sources_N.bincount().min()) * tokens.length


def _scoring_of(criterion: WidthCriterion, unit: Unit, *, hidden: int) -> Work:
    """Return the work of scoring a unit on one token: the criterion's products, and float32 copies of activations."""
    return Work(products=criterion.token_operations(unit.width, hidden), stream=4 * 4 * unit.width)


def _ablation(criterion: AblationCriterion, models: PlannedModels, *, tokens: Tokens, remove: int) -> Work:
    """Return the work of all rounds of ablation: layer passes, logits of every model, and refits."""
    layers = models.anatomy.num_layers
    cost = criterion.ablation_cost(layers, remove=remove, windows=tokens.windows, length=tokens.length)
    costs = models.dense_costs(tokens.length)
    judged, vocabulary = cost.windows * cost.predicted, text_config(models.dense.config).vocab_size
    work = forward_work(costs, tokens) * cost.forward_passes + visited(costs) * cost.rounds
    work += Work(
        products=cost.models * judged * head_operations(models.dense),
        stream=cost.models * judged * vocabulary * 4 * 8,
    )
    if criterion.refit:
        windows = min(criterion.refit.windows, max(tokens.windows - criterion.windows, 0))
        units = [next((unit for unit in units if unit.refit), None) for units in models.anatomy.units]
        rounds = (cost.models - cost.rounds) / layers
        refit, solved = Refit(ridge=criterion.refit.ridge), windows * tokens.length
        refits = (
            refit_work(unit.width, models.hidden, tokens=solved, refit=refit, folds=1) for unit in filter(None, units)
        )
        work += Work.total(refits) * rounds
    return work
