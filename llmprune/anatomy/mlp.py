"""Find the units of MLP neurons: grouped by the width field that sets their size, then proven on the module's own code.

The proof: a module built with fewer neurons, given the weights of some neurons of a wider module, has the output of
the wider module with the other neurons masked. It holds for exactly one layout of the tensors.

Shapes in names: B batch, L sequence length, D hidden size, E experts, F neurons, K neurons kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.config_probe import Change, Field, RepresentativeModel
from llmprune.anatomy.expert_hooks import activations_of_experts
from llmprune.anatomy.gated_mlp import find_up
from llmprune.anatomy.hooks import inputs_of
from llmprune.anatomy.meta_model import fill_with_noise, find_layers, text_config
from llmprune.anatomy.names import holder_of, is_inside, paths_around, relative_name, tensor_of
from llmprune.anatomy.proof import RUN_ERRORS, ActivationShape, equal_up_to_rounding, hidden_states_of
from llmprune.anatomy.selection import mask_neurons, select_neurons
from llmprune.anatomy.types import FusedSlice, MlpUnit, PrunableDim

LayerUnits = tuple[tuple[MlpUnit, ...], ...]  # by layer of the representative model
PROOF_WIDTH = 16  # neurons of the wide module of a proof; a unit may have a multiple of its field's value
_KEPT = 8  # neurons of the narrow module
_TOKENS = 16


def units_of_field(field: Field, representative: RepresentativeModel, *, small: dict[str, int]) -> LayerUnits | str:
    """Return the proven units of every layer of the representative model; or the reason why the field is no width.

    ``small``: values of config fields that make the model quick to run.
    """
    wide = representative.with_fields(small | {field.name: PROOF_WIDTH})
    narrow = representative.with_fields(small | {field.name: _KEPT})
    if wide is None or narrow is None:
        return f"no model can be built whose {field.name} is {_KEPT}"
    wide_layers, narrow_layers = (find_layers(model)[1] for model in (wide, narrow))
    hidden = text_config(representative.model.config).hidden_size
    units: list[tuple[MlpUnit, ...]] = []
    for index, changes in enumerate(field.changes):
        proven: list[MlpUnit] = []
        for path, own in _by_holder(changes).items():
            pair = Pair(wide_layers[index], narrow_layers[index], hidden, tuple(proven))
            proposals = _propose(representative.layers[index], path, changes=own, field=field)
            unit = next((found for unit in proposals if (found := pair.prove(unit)) is not None), None)
            if unit is None:
                place = path or "the layer itself"
                return f"{place}: its output is not the same when neurons are cut as when they are masked"
            proven.append(unit)
        units.append(tuple(proven))
    return tuple(units)


def _by_holder(changes: tuple[Change, ...]) -> dict[str, list[Change]]:
    """Group changes by the module that holds them. Experts come last: their proof may need the other units."""
    holders: dict[str, list[Change]] = {}
    for change in sorted(changes, key=lambda change: "expert" in change.name and "shared" not in change.name):
        holders.setdefault(holder_of(change.name), []).append(change)
    return holders


def _propose(layer: nn.Module, path: str, *, changes: list[Change], field: Field) -> Iterator[MlpUnit]:
    """Yield candidate units: one for each weight that may be the output projection, in each layout of the others."""
    tensors = {change.name: tensor_of(layer, change.name) for change in changes}
    for output in reversed(changes):
        shape = tensors[output.name].shape
        if not _may_be_output(layer, output, ndim=len(shape)):
            continue
        ratios = {change.times / output.times for change in changes}
        if not ratios <= {1.0, 2.0}:
            continue
        for fused in ((1, 1), (2,)) if 2.0 in ratios else ((1,),):
            inputs = [
                PrunableDim(change.name, change.dim, fused if change.times > output.times else (1,))
                for change in changes
                if change is not output
            ]
            yield MlpUnit(
                path,
                (*inputs, PrunableDim(output.name, output.dim)),
                output.times * field.value,
                field.name,
                output.times,
                experts=shape[0] if len(shape) == 3 else None,
                refit=False,
            )


def _may_be_output(layer: nn.Module, change: Change, *, ndim: int) -> bool:
    module = layer.get_submodule(change.name.rpartition(".")[0])
    if isinstance(module, nn.Linear):
        return change.dim == 1 and ndim == 2
    if isinstance(module, Conv1D):
        return change.dim == 0 and ndim == 2
    return ndim == 3 and change.dim > 0


@dataclass(frozen=True)
class Pair:
    """A layer and the same layer with fewer neurons, both without weights.

    ``hidden``: the hidden size D; ``proven``: units of the same field that are proven already.
    """

    wide: nn.Module
    narrow: nn.Module
    hidden: int
    proven: tuple[MlpUnit, ...]

    @torch.no_grad()
    def prove(self, unit: MlpUnit) -> MlpUnit | None:
        """Return the unit with ``refit`` and ``up`` as the proof found them; None where no module proves it.

        The proof runs the smallest module around the unit that runs on hidden states alone.
        """
        for path in paths_around(unit.path):
            try:
                found = self._prove_at(path, unit)
            except RUN_ERRORS:
                continue
            if found is not None:
                return found
        return None

    def _prove_at(self, path: str, unit: MlpUnit) -> MlpUnit | None:
        hidden_BLD = torch.randn(1, _TOKENS, self.hidden, generator=torch.Generator().manual_seed(1))
        inspect.signature(self.wide.get_submodule(path).forward).bind(hidden_BLD)  # fails before weights are made
        wide = copy.deepcopy(self.wide.get_submodule(path)).float()
        narrow = copy.deepcopy(self.narrow.get_submodule(path)).float()
        fill_with_noise(wide)
        before = dict(wide.state_dict())
        own = _Narrowing.find(unit, path, wide=wide, narrow=narrow)
        shape = ActivationShape(own.width, _TOKENS)
        with _observed(wide, _within(unit, path), shape=shape):
            wide(hidden_BLD.clone())
        others = [other for other in self.proven if is_inside(other.path, path)]
        inner = [_Narrowing.find(other, path, wide=wide, narrow=narrow) for other in others]
        if not all(narrowing.has_proof_sizes for narrowing in (*inner, own)):
            return None
        fewer, masked = dict(before), dict(before)
        for narrowing in (*inner, own):
            keep = narrowing.random_keep(seed=2)
            fewer |= narrowing.selected(before, keep)
            masked |= narrowing.masked(before, keep)
        expected = _output(wide, masked, hidden_BLD=hidden_BLD)
        after = _output(narrow, fewer, hidden_BLD=hidden_BLD)
        # control: an output projection with the columns of other neurons must be noticed
        other_columns = own.selected_output(before, own.random_keep(seed=3))
        control = _output(narrow, fewer | other_columns, hidden_BLD=hidden_BLD)
        proven = equal_up_to_rounding(after, expected) and not equal_up_to_rounding(control, expected)
        if not proven or not shape.has_width:
            return None
        refit = unit.experts is None and shape.has_every_token
        up = _find_up(wide, path, unit=unit, before=before, hidden_BLD=hidden_BLD) if refit else None
        return replace(unit, refit=refit, up=up)


@dataclass(frozen=True)
class _Narrowing:
    """A unit of a wide and a narrow module.

    ``cuts``: its tensors, by their names in the modules; ``experts``: that stack its tensors, None for one MLP;
    ``width``, ``kept``: neurons of the wide and of the narrow module; ``times``: multiple of the field's value.
    """

    prunables: tuple[PrunableDim, ...]
    experts: int | None
    width: int
    kept: int
    times: int

    @classmethod
    def find(cls, unit: MlpUnit, path: str, *, wide: nn.Module, narrow: nn.Module) -> _Narrowing:
        """Look up the sizes of a unit in the modules at ``path``."""
        prunables = _within(unit, path).tensors
        output = tensor_of(wide, prunables[-1].name)
        width, kept = (tensor_of(module, prunables[-1].name).shape[prunables[-1].dim] for module in (wide, narrow))
        return cls(prunables, None if unit.experts is None else len(output), width, kept, unit.times)

    @property
    def has_proof_sizes(self) -> bool:
        """True where the two modules differ as their config fields do."""
        return (self.width, self.kept) == (self.times * PROOF_WIDTH, self.times * _KEPT)

    def random_keep(self, seed: int) -> Tensor:
        """Return neurons to keep, in random order: int64 [K], or [E, K] with other neurons for each expert."""
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(self.width, generator=generator)[: self.kept] for _ in range(self.experts or 1)]
        return torch.stack(rows) if self.experts is not None else rows[0]

    def selected(self, tensors: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """Return the unit's tensors with the kept neurons only."""
        return {
            prunable.name: select_neurons(tensors[prunable.name], prunable, keep=keep) for prunable in self.prunables
        }

    def selected_output(self, tensors: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """Return the weight of the output projection with the kept neurons only."""
        return {
            self.prunables[-1].name: select_neurons(tensors[self.prunables[-1].name], self.prunables[-1], keep=keep)
        }

    def masked(self, tensors: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """Return the weight of the output projection with zeros for all but the kept neurons."""
        return {self.prunables[-1].name: mask_neurons(tensors[self.prunables[-1].name], self.prunables[-1], keep=keep)}


def _within(unit: MlpUnit, path: str) -> MlpUnit:
    """Return a unit with its names relative to the module at ``path``."""
    tensors = tuple(replace(prunable, name=relative_name(prunable.name, path)) for prunable in unit.tensors)
    return replace(unit, path=relative_name(unit.path, path), tensors=tensors)


def _observed(module: nn.Module, unit: MlpUnit, *, shape: ActivationShape) -> AbstractContextManager[None]:
    """Record the shape of the unit's activations in every run of the module, while the context lasts."""
    if unit.experts is None:
        return inputs_of(module.get_submodule(unit.output), shape.note)
    weight = tensor_of(module, unit.tensors[-1].name)
    return activations_of_experts(
        module.get_submodule(unit.path), weight, see=lambda _, activation_TF: shape.note(activation_TF)
    )


def _find_up(
    module: nn.Module, path: str, *, unit: MlpUnit, before: dict[str, Tensor], hidden_BLD: Tensor
) -> FusedSlice | None:
    """Return the up projection of a unit of the module at ``path``, found by runs with other weights."""
    seen: list[Tensor] = []

    def activations(tensors: dict[str, Tensor]) -> Tensor:
        _output(module, tensors, hidden_BLD=hidden_BLD)
        return seen.pop()

    own = _within(unit, path)
    try:
        with inputs_of(module.get_submodule(own.output), seen.append):
            found = find_up(own, before, activations=activations)
    except RUN_ERRORS:  # of weights this large; the unit itself is proven
        return None
    if found is None:
        return None
    return FusedSlice(unit.tensors[own.tensors.index(found.tensor)], found.entry)


def _output(module: nn.Module, tensors: dict[str, Tensor], *, hidden_BLD: Tensor) -> Tensor:
    module.load_state_dict(tensors, assign=True)
    return hidden_states_of(module(hidden_BLD.clone()))
