"""Decisions of pass 2 for one kept layer, as a value: computed from the cut, the anatomy and the recipe alone."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.anatomy.types import Anatomy, AttentionUnit, MlpUnit, Unit, routed_units, unit_key
from llmprune.cut.decision import Cut, gap_after
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity


@dataclass(frozen=True)
class LayerStep:
    """Work of pass 2 on one kept layer.

    ``new``, ``old``: index in the pruned and in the dense model. ``gap``: the removed layers after it.
    ``cut_parts``: keys of its units that lose neurons, experts or heads.
    ``mlp``, ``attention``: the MLP that is refit, and the attention that loses heads and is refit; None if there is
    none. ``experts``: routed experts that are refit; None if there are none. ``mlp_outputs``: output projections of all
    its MLPs.
    ``is_untouched``: nothing is cut up to this layer and its gap, so that dense and pruned hidden states are equal.
    ``uses_dense``: dense hidden states are needed, to refit towards them or to measure an error.
    ``is_refit``: the refit is on. ``refits_mixer``, ``refits_up``: it may change the token mixer's output projection,
    and the up projection. ``refits_sparse``: output projections are refit while they are made sparse.
    """

    new: int
    old: int
    gap: range
    cut_parts: frozenset[str]
    mlp: MlpUnit | None
    attention: AttentionUnit | None
    experts: MlpUnit | None
    mlp_outputs: frozenset[str]
    is_untouched: bool
    uses_dense: bool
    is_refit: bool
    is_sparse: bool
    refits_mixer: bool
    refits_up: bool
    refits_sparse: bool

    def key(self, unit: Unit) -> str:
        """Key of one of the layer's units in a ``Cut``."""
        return unit_key(self.old, unit.path)

    def narrows(self, unit: Unit) -> bool:
        """Check that the unit loses neurons."""
        return self.key(unit) in self.cut_parts

    def cuts_only(self, unit: Unit) -> bool:
        """Check that nothing but neurons of this unit is cut from the layer."""
        return self.cut_parts <= {self.key(unit)}

    @property
    def refits_output(self) -> bool:
        """True if an output projection is refit in a stage of its own, not while it is made sparse."""
        return self.is_refit and not self.is_untouched and not self.refits_sparse

    @property
    def is_beside_removed(self) -> bool:
        """True if layers right after it are removed, or any before it."""
        return bool(self.gap) or self.new != self.old

    @property
    def needs_topology(self) -> bool:
        """True if the refit needs to know which projections write to the residual stream."""
        return self.refits_sparse or (self.refits_output and (self.mlp is None or self.refits_mixer))


def steps_of(cut: Cut, anatomy: Anatomy, *, refit: Refit | None, sparsity: Sparsity | None) -> tuple[LayerStep, ...]:
    """Return the steps of pass 2, one for every kept layer, in order."""
    refits_sparse = sparsity is not None and sparsity.method.refits and refit is not None
    uses_dense = sparsity is None or refits_sparse or not cut.is_empty
    refit = refit if uses_dense else None
    first_gap = cut.removed[0] if cut.removed else None
    steps = []
    is_narrowed = False
    for new, old in enumerate(cut.layers):
        parts = cut_parts(old, anatomy, cut=cut)
        is_narrowed = is_narrowed or bool(parts)
        attention = _narrowed_attention(old, anatomy, cut=cut) if refit else None
        needs_mixer = refit is not None and (old != new or attention is not None)
        steps.append(
            LayerStep(
                new=new,
                old=old,
                gap=gap_after(cut.layers, new, num_layers=cut.num_layers),
                cut_parts=parts,
                mlp=next((unit for unit in anatomy.units[old] if unit.refit), None) if refit else None,
                attention=attention,
                experts=next(iter(routed_units(anatomy, old)), None) if refit else None,
                mlp_outputs=frozenset(unit.output for unit in anatomy.units[old]),
                is_untouched=sparsity is None and not is_narrowed and (first_gap is None or first_gap > old + 1),
                uses_dense=uses_dense,
                is_refit=refit is not None,
                is_sparse=sparsity is not None,
                # sparse output projections are refit anyway: the mixer's only if the up projection needs it done
                refits_mixer=needs_mixer and (not refits_sparse or (refit is not None and refit.up)),
                refits_up=refit is not None and refit.up,
                refits_sparse=refits_sparse,
            )
        )
    return tuple(steps)


def cut_parts(layer: int, anatomy: Anatomy, *, cut: Cut) -> frozenset[str]:
    """Return the keys of the layer's units that lose neurons, and of experts and heads if some are removed."""
    block, attention = anatomy.blocks[layer], anatomy.attention[layer]
    keys = {unit_key(layer, unit.path) for unit in anatomy.units[layer]} & cut.neurons.keys()
    experts = {unit_key(layer, block.path)} & cut.experts.keys() if block else set()
    heads = {unit_key(layer, attention.path)} & cut.heads.keys() if attention else set()
    return frozenset(keys | {f"experts of {key}" for key in experts} | {f"heads of {key}" for key in heads})


def _narrowed_attention(layer: int, anatomy: Anatomy, *, cut: Cut) -> AttentionUnit | None:
    """Return the layer's attention if it loses heads and every token passes it."""
    unit = anatomy.attention[layer]
    return unit if unit and unit.refit and unit_key(layer, unit.path) in cut.heads else None
