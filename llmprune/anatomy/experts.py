"""Find the experts of mixtures: the field that sets their number, their tensors, and the groups of their router.

The number of groups is the smallest for which the proof (``expert_proof``) holds, with all experts and with one fewer
in each group: one group in most mixtures. So no config field is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llmprune.anatomy.config_probe import Change, Field, RepresentativeModel
from llmprune.anatomy.expert_proof import BlockProof, Outcome
from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.names import holder_of
from llmprune.anatomy.types import ExpertBlock, Experts, PrunableDim

FEW_EXPERTS = (16, 64)  # enough for the proof, and quick; the second where there are eight groups
Blocks = tuple[ExpertBlock | None, ...]


def expert_field(fields: Sequence[Field], representative: RepresentativeModel) -> tuple[Field, Blocks] | None:
    """Return the field that sets the number of experts, and the block of every layer of the representative model."""
    return next(((field, blocks) for field in fields if (blocks := _blocks(field, representative)) is not None), None)


def prove_experts(
    found: tuple[Field, Blocks] | None, representative: RepresentativeModel, *, small: Sequence[dict[str, int]]
) -> Experts | None:
    """Return the experts, with a refusal where none can be removed; None for a model without a mixture.

    ``small``: values of config fields that make the model quick to run, tried in turn until the proof holds.
    """
    config = text_config(representative.model.config)
    top_k = getattr(config, "num_experts_per_tok", None)
    if found is None:
        stacks = [tensor for name, tensor in representative.layers.named_parameters() if _is_stack(name, tensor)]
        reason = "no config field sets the number of experts and nothing else, so a model with fewer would not reload"
        return Experts("", stacks[0].shape[0], top_k, reason) if stacks else None
    field, blocks = found
    experts = Experts(field.name, field.value, top_k, None)
    for fields in small:
        experts = _Search(experts, blocks, representative, fields).find()
        if experts.refusal is None:
            break
    return experts


def _is_stack(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 3 and "expert" in name


def _blocks(field: Field, representative: RepresentativeModel) -> Blocks | None:
    """Return the blocks whose number of experts this field sets; None where it sets something else."""
    blocks: list[ExpertBlock | None] = []
    for layer, changes in zip(representative.layers, field.changes, strict=True):
        tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
        stacks = [change for change in changes if change.dim == 0 and tensors[change.name].ndim == 3]
        holders = {holder_of(change.name) for change in stacks}
        if changes and (len(holders) != 1 or any(change.times != 1 for change in changes)):
            return None
        blocks.append(ExpertBlock(holders.pop(), _prunable_dims(changes)) if changes else None)
    return tuple(blocks)


def _prunable_dims(changes: Sequence[Change]) -> tuple[PrunableDim, ...]:
    return tuple(PrunableDim(change.name, change.dim) for change in changes)


@dataclass(frozen=True)
class _Search:
    """Search for the groups that experts are chosen in, on models with the values ``small`` in config fields."""

    experts: Experts
    blocks: Blocks
    representative: RepresentativeModel
    small: dict[str, int]

    def find(self) -> Experts:
        """Return the experts with their groups, and the top k that their blocks use; or with a refusal."""
        count = self.small.get(self.experts.field, self.experts.count)
        whole = self._outcome(count, 1)
        found = replace(self.experts, top_k=whole.top_k or self.experts.top_k, refusal=whole.refusal)
        for groups in (1, *self._divisors(count)):
            outcome = whole if groups == 1 else self._outcome(count, groups)
            if outcome.refusal is None:
                least = self._least(groups, count=count, top_k=outcome.top_k or 1)
                if least is not None:
                    return replace(found, refusal=None, groups=groups, fewest=least)
                refusal = f"no model can be built whose {found.field} is {count - groups}"
                if groups > 1:
                    refusal = f"each of its {groups} groups needs all of its {count // groups} experts"
                found = replace(found, refusal=refusal)
            elif not outcome.depends_on_order:
                break
        return found

    def _divisors(self, count: int) -> list[int]:
        """Return the numbers of groups of at least two experts that all sizes of the model can have."""
        return [groups for groups in range(2, count // 2 + 1) if count % groups == self.experts.count % groups == 0]

    def _least(self, groups: int, *, count: int, top_k: int) -> int | None:
        """Return the fewest experts of a model with one fewer in each group or less; None where there is none.

        Every token needs ``top_k`` different experts of its chosen groups, and a router of groups some in each. Where
        all experts of the model are chosen, their order shows nothing, so there are more.
        """
        if groups == 1:  # without groups any number of at least top k works; one fewer shows that the model builds
            fewer = self.representative.with_fields(self.small | {self.experts.field: count - 1})
            runs = count - 1 < top_k or (fewer is not None and self._outcome(count - 1, 1).refusal is None)
            return top_k if fewer is not None and runs else None
        sizes = range((top_k // groups + 1) * groups, count, groups)
        if not sizes or not self._works(sizes[-1], groups):
            return None
        return next(size for size in sizes if self._works(size, groups))

    def _works(self, count: int, groups: int) -> bool:
        outcome = self._outcome(count, groups)
        return outcome.refusal is None and outcome.uses_all

    def _outcome(self, count: int, groups: int) -> Outcome:
        """Return the outcome of the proof for all blocks: the first refusal, or the last."""
        model = self.representative.with_fields(self.small | {self.experts.field: count})
        if model is None:
            return Outcome(f"no model can be built whose {self.experts.field} is {count}")
        outcome, uses_all = Outcome("no layer has experts"), True
        for layer, block in zip(find_layers(model)[1], self.blocks, strict=True):
            if block is None:
                continue
            hidden = text_config(model.config).hidden_size
            outcome = BlockProof(layer, block, count=count, hidden=hidden).prove(groups)
            uses_all = uses_all and outcome.uses_all
            if outcome.refusal:
                return outcome
        return replace(outcome, uses_all=uses_all)
