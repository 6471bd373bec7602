"""Work of pass 2, layer by layer: the stages of ``prune.pass2``, counted from models without weights.

Where the scores choose the layers, those in the middle are taken. A residual writer is assumed to have no norm behind
it, which only the weights show; with one, a layer is run once more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from llmprune.anatomy.projections import Projection, projections_of
from llmprune.anatomy.stacked_projections import stacked_projections
from llmprune.anatomy.types import MlpUnit, routed_units
from llmprune.common.linalg.gram import gram_operations
from llmprune.planning.duration.operations import LayerCost, Work, cut_refit_work, refit_work, up_refit_work
from llmprune.planning.duration.parts import Part, PlannedModels, Tokens, is_cached
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import EPOCHS, WINDOWS_OF_STEP, Refit
from llmprune.recipe.sparsity import Sparsity, select

_PASSES_OF_TRAINING = 3  # forward passes that take as long as a forward and a backward pass
_BYTES_OF_STEP = 32.0  # of each weight that a step of Adam reads and writes: itself, its gradient, two moments
_CALLS_OF_EXPERT = 80  # operations started to find an expert's tokens in a batch, run it and add up the sums
_SUPPORT_PRODUCTS = 3  # products with XᵀX for each matrix that ``masked_least_squares`` solves on its support


def pass2_part(recipe: Recipe, models: PlannedModels) -> Part:
    """Return pass 2."""
    count = Pass2Count.of(recipe, models)
    layers = models.planned.layers
    work = Work.total(count.of_layer(new) for new in range(len(layers)))
    if count.uses_dense and not count.is_cached:
        work += Work.total(count.run(count.dense[index]) for index in range(layers[0]))
    return Part(step="pass 2", name="pass 2: cut and refit", work=work, items=len(layers), shared=True)


@dataclass(frozen=True)
class Pass2Count:
    """Counts the work of pass 2.

    ``dense``, ``cut``: cost of each dense layer, and of each kept one as it will be. ``is_narrowed``: layers lose
    neurons, heads or experts; ``cuts_neurons_only``: neurons and nothing else. ``is_cached``: dense hidden states are
    those that pass 1 stored. ``refit``: None where nothing is refit. ``refits_sparse``: output projections are refit
    while they are made sparse.
    """

    recipe: Recipe
    models: PlannedModels
    tokens: Tokens
    dense: tuple[LayerCost, ...]
    cut: tuple[LayerCost, ...]
    is_narrowed: bool
    cuts_neurons_only: bool
    is_cached: bool
    refit: Refit | None
    refits_sparse: bool
    uses_dense: bool

    @classmethod
    def of(cls, recipe: Recipe, models: PlannedModels) -> Pass2Count:
        """Return the counts of a recipe."""
        anatomy, planned, tokens = models.anatomy, models.planned, Tokens.of(recipe, models)
        neurons = any(kept < anatomy.widths[field] for field, kept in planned.widths.kept.items())
        heads = anatomy.heads is not None and planned.heads.kv_groups != anatomy.heads.count
        experts = anatomy.experts is not None and planned.experts != anatomy.experts.count
        is_cut = neurons or heads or experts or len(planned.layers) < anatomy.num_layers or bool(planned.hidden.size)
        sparsity, refit = recipe.sparsity, recipe.refit
        refits_sparse = bool(sparsity and sparsity.method.refits and refit)
        uses_dense = sparsity is None or refits_sparse or is_cut
        return cls(
            recipe=recipe,
            models=models,
            tokens=tokens,
            dense=models.dense_costs(tokens.length),
            cut=models.pruned_costs(tokens.length),
            is_narrowed=neurons or heads or experts,
            cuts_neurons_only=neurons and not heads and not experts,
            is_cached=is_cached(recipe, models),
            refit=refit if uses_dense else None,
            refits_sparse=refits_sparse,
            uses_dense=uses_dense,
        )

    def run(self, cost: LayerCost, *, mixer: bool = True, mlp: bool = True) -> Work:
        """Return the work of passing all windows through a layer, or only through its token mixer or its MLP."""
        return cost.run(self.tokens.count, self.tokens.batches, mixer=mixer, mlp=mlp)

    def of_layer(self, new: int) -> Work:
        """Return the work on one kept layer and the gap after it."""
        kept, sparsity = self.models.planned.layers, self.recipe.sparsity
        old = kept[new]
        gap = range(old + 1, kept[new + 1] if new + 1 < len(kept) else len(self.dense))
        dense, cut = self.dense[old], self.cut[new]
        written = Work(weights=dense.bytes + cut.bytes, files=cut.bytes)
        work = written + (self._dense_passes(old, gap) if self.uses_dense else Work())
        work += self._cut_channels(new, old)
        is_untouched = sparsity is None and not self.is_narrowed and new == old and not gap
        if is_untouched:
            return work
        if self.refit is not None and not self.refits_sparse:
            work += self._refits(new, old, refit=self.refit) + self._expert_refits(new, old, refit=self.refit)
        work += self._final_run(new, old) + self._training(new)
        return work + (self._sparsified(new, sparsity) if sparsity is not None else Work())

    def _cut_channels(self, new: int, old: int) -> Work:
        """Return the work of cutting residual channels out of a layer, and of repairing what reads and writes them."""
        kept, tokens, hidden = self.models.planned.hidden.size, self.tokens.count, self.models.hidden
        if kept is None:
            return Work()
        work = self.run(self.cut[new])
        if self.refit is None:
            return work
        folds = self.refit.folds(self.recipe.calibration.number_of_sources()) if self.tokens.windows > 1 else 1
        attention, unit = self.models.anatomy.attention[old], self._unit(old)
        work += self.run(self.dense[old]) + self.run(self.cut[new]) * 2  # the stages run parts of the layer
        work += refit_work(kept, hidden, tokens=tokens, refit=self.refit, folds=folds) * 2
        writers = [attention.width if attention else hidden, *([self._kept_width(unit)] if unit else [])]
        return work + Work.total(
            refit_work(inputs, kept, tokens=tokens, refit=self.refit, folds=folds) for inputs in writers
        )

    def _training(self, new: int) -> Work:
        """Return the work of training a layer: forward and backward passes over single windows, and Adam's steps."""
        if self.refit is None or not self.refit.block:
            return Work()
        cut, windows = self.cut[new], self.tokens.windows
        epoch = cut.run(self.tokens.count, windows) * _PASSES_OF_TRAINING
        entries = cut.bytes / self.models.itemsize
        steps = -(-windows // WINDOWS_OF_STEP)
        return (epoch + Work(stream=steps * entries * _BYTES_OF_STEP)) * EPOCHS

    def _final_run(self, new: int, old: int) -> Work:
        """Return the work of the layer's final outputs; of an MLP that was refit only its last product is computed."""
        unit = self._unit(old)
        if self.refit is None or unit is None or self.recipe.sparsity is not None:
            return self.run(self.cut[new])
        width, hidden, tokens = self._kept_width(unit), self.models.hidden, self.tokens.count
        kept = Work(products=2 * width * hidden * tokens, stream=2 * self.models.itemsize * width * tokens)
        return kept + self.run(self.cut[new], mixer=not self._shares_mixer(old), mlp=False)

    def _dense_passes(self, old: int, gap: range) -> Work:
        """Return the work of advancing the dense hidden states over a layer and its gap, and of comparing them."""
        stream = Work(stream=4 * self.tokens.count * self.models.hidden * self.models.itemsize)
        runs = [self.run(self.dense[index]) + stream for index in (old, *gap)]
        weights = Work(weights=sum(self.dense[index].bytes for index in gap))
        if self.is_cached:  # the layer is run only where its writers are refit while they are made sparse
            return stream * len(runs) + (runs[0] if self.refits_sparse else Work())
        return Work.total(runs) + weights

    def _unit(self, old: int) -> MlpUnit | None:
        """Return the MLP of a layer that is refit."""
        return next((unit for unit in self.models.anatomy.units[old] if unit.refit), None)

    def _kept_width(self, unit: MlpUnit) -> int:
        return unit.times * self.models.planned.widths.kept.get(unit.field, unit.width // unit.times)

    def _shares_mixer(self, old: int) -> bool:
        """Check whether the token mixer runs once for the uncut and the cut layer."""
        return self._follows(old) and self.recipe.sparsity is None

    def _refits(self, new: int, old: int, *, refit: Refit) -> Work:
        """Return the work of a layer's refits: runs on the pruned hidden states, sums, solutions."""
        anatomy, hidden, tokens = self.models.anatomy, self.models.hidden, self.tokens.count
        dense, cut, unit = self.dense[old], self.cut[new], self._unit(old)
        folds = refit.folds(self.recipe.calibration.number_of_sources()) if self.tokens.windows > 1 else 1
        attention, heads = anatomy.attention[old], anatomy.heads
        loses_heads = bool(attention and heads and self.models.planned.heads.kv_groups != heads.count)
        shares, refits_mixer = self._shares_mixer(old), new != old or loses_heads
        work = Work()
        if refits_mixer:  # the token mixer's output projection
            inputs = attention.width if attention else hidden
            groups = (self.models.planned.heads.kv_groups or 0) / heads.count if heads and attention else 1
            parts = 2 if loses_heads else 1
            work += self.run(dense, mlp=False) * 2
            work += refit_work(int(inputs * groups), hidden, tokens=tokens, refit=refit, folds=folds, parts=parts)
            if shares:
                work += Work(products=2 * inputs * hidden * tokens)
        if unit is None:
            return work
        width, is_mixer_known = self._kept_width(unit), shares and refits_mixer
        if refit.up and unit.up and width < unit.width:
            work += self.run(cut, mixer=not is_mixer_known)
            work += up_refit_work(hidden, width, outputs=hidden, tokens=tokens)
            work += self.run(dense, mixer=not shares) + self.run(cut, mixer=not shares)
        elif self._follows(old):  # of the output projection only the product with kept inputs is computed
            removed = unit.width - width
            work += self.run(dense, mixer=not is_mixer_known) + Work(products=-2 * removed * hidden * tokens)
            return work + cut_refit_work(width, hidden, removed=removed, tokens=tokens, refit=refit, folds=folds)
        else:
            work += self.run(dense) + self.run(cut)
        return work + refit_work(width, hidden, tokens=tokens, refit=refit, folds=folds, parts=2)

    def _follows(self, old: int) -> bool:
        """Check whether the cut layer's activations follow from those of the uncut one, so that only that is run."""
        loses_others = self.is_narrowed and not self.cuts_neurons_only
        return self._unit(old) is not None and not loses_others

    def _expert_refits(self, new: int, old: int, *, refit: Refit) -> Work:
        """Return the work of refitting routed experts: two runs of the layer, three of its experts, and the solves."""
        anatomy, hidden, tokens = self.models.anatomy, self.models.hidden, self.tokens.count
        unit = next(iter(routed_units(anatomy, old)), None)
        if unit is None:
            return Work()
        experts = self.models.planned.experts or unit.experts or 1
        folds = refit.folds(self.recipe.calibration.number_of_sources()) if self.tokens.windows > 1 else 1
        own = tokens * ((anatomy.experts and anatomy.experts.top_k) or experts) / experts
        each = refit_work(self._kept_width(unit), hidden, tokens=own, refit=refit, folds=folds, parts=2)
        calls = Work(calls=3 * self.tokens.batches * experts * _CALLS_OF_EXPERT)
        runs = self.run(self.dense[old]) + self.run(self.cut[new]) + self.run(self.cut[new], mixer=False) * 2
        return runs + each * experts + calls

    def _sparsified(self, new: int, sparsity: Sparsity) -> Work:
        """Return the work of making a layer's matrices sparse: sums of their inputs, and the method."""
        layer = self.models.pruned_layers[new]
        chosen = select(projections_of(layer), sparsity, experts=self.models.planned.experts).chosen
        moments = sparsity.required_moments(self.recipe.refit is not None)
        tokens, hidden = self.tokens.count, self.models.hidden
        work = Work(stream=2 * self.models.itemsize * tokens * sum(one.inputs for one in projections_of(layer)))
        writers = self._writers(self.models.planned.layers[new])
        for together in _by_input(chosen, writers):
            inputs, outputs = together[0].inputs, sum(one.outputs for one in together)
            if self.refits_sparse and self.refit is not None and together[0].name in writers:
                work += refit_work(inputs, hidden, tokens=tokens, refit=self.refit, folds=2)
            elif moments == "gram":
                work += Work(sums=tokens * gram_operations(inputs), stream=tokens * 8 * inputs)
            elif moments == "squares":
                work += Work(stream=tokens * 8 * inputs)
            if sparsity.permutes and together[0].name in writers:
                refits = self.recipe.refit is not None
                work += Work(solves=sparsity.order_operations(outputs, inputs, refit=refits))
            support = 2 * _SUPPORT_PRODUCTS * outputs * inputs**2 if self.refits_sparse else 0
            work += Work(solves=sparsity.rounds * (sparsity.method.operations(outputs, inputs) + support))
        return work + self._sparsified_experts(new, sparsity)

    def _sparsified_experts(self, new: int, sparsity: Sparsity) -> Work:
        """Return the same work for the matrices of routed experts, each with its own tokens."""
        anatomy, tokens, work = self.models.anatomy, self.tokens.count, Work()
        units = routed_units(anatomy, self.models.planned.layers[new])
        stacks = stacked_projections(self.models.pruned_layers[new], units)
        for one in select(stacks, sparsity, experts=None).chosen:
            share = ((anatomy.experts and anatomy.experts.top_k) or one.experts) / one.experts
            support = 2 * _SUPPORT_PRODUCTS * one.outputs * one.inputs**2 if self.refits_sparse else 0
            each = sparsity.rounds * (sparsity.method.operations(one.outputs, one.inputs) + support)
            work += Work(solves=one.experts * each, calls=self.tokens.batches * one.experts * _CALLS_OF_EXPERT)
            if sparsity.required_moments(self.recipe.refit is not None) == "gram":
                work += Work(sums=one.experts * share * tokens * gram_operations(one.inputs))
        return work

    def _writers(self, old: int) -> set[str]:
        """Return the names of the output projections of a layer."""
        attention = self.models.anatomy.attention[old]
        return {unit.output for unit in (*self.models.anatomy.units[old], *([attention] if attention else []))}


def _by_input(chosen: tuple[Projection, ...], writers: set[str]) -> list[list[Projection]]:
    """Group projections that read the same input: those of one module with as many inputs, output projections alone."""
    groups: dict[tuple[str, int], list[Projection]] = defaultdict(list)
    for one in chosen:
        parent = one.name if one.name in writers else one.name.rpartition(".")[0]
        groups[parent, one.inputs].append(one)
    return list(groups.values())
