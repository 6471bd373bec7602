"""Units of neurons: grouped from what a width field sets, then proven on the module's own code.

The proof: a module built with fewer neurons, given the weights of some neurons of a wider one,
puts out what the wider one does when the others are masked. It holds for one layout only.

Shapes in names: B batch, L sequence length, D hidden size, E experts, F neurons, K neurons kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.config_probe import Change, Field, RepresentativeModel
from llmprune.anatomy.expert_hooks import activations_of_experts
from llmprune.anatomy.gated_mlp import find_up
from llmprune.anatomy.meta_model import fill_with_noise, find_layers, text_config
from llmprune.anatomy.selection import mask_neurons, select_neurons
from llmprune.anatomy.types import FusedSlice, MlpUnit, PrunableDim

PROOF_WIDTH = 16  # neurons of the module that is proven, times whatever the unit is of its field
_KEPT = 8
_TOKENS = 16
# What a module may raise that cannot be run on hidden states alone, or not with these tensors.
RUN_ERRORS = (TypeError, RuntimeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)


def units_of_field(
    field: Field, representative: RepresentativeModel, *, small: dict[str, int]
) -> tuple[tuple[tuple[MlpUnit, ...], ...], str | None]:
    """The proven units of every representative layer, and why the field is no proven width (None where it is).

    ``small``: fields that make the representative quick to run.
    """
    wide = representative.with_fields(small | {field.name: PROOF_WIDTH})
    narrow = representative.with_fields(small | {field.name: _KEPT})
    nothing: tuple[tuple[MlpUnit, ...], ...] = ((),) * len(representative.layers)
    if wide is None or narrow is None:
        return nothing, f"no model can be built whose {field.name} is {_KEPT}"
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
                return nothing, f"{place}: its output is not the same when neurons are cut as when they are masked"
            proven.append(unit)
        units.append(tuple(proven))
    return tuple(units), None


def _by_holder(changes: tuple[Change, ...]) -> dict[str, list[Change]]:
    """The changes in each module that holds some; those of experts last, whose proof may need the others'."""
    holders: dict[str, list[Change]] = {}
    for change in sorted(changes, key=lambda change: "expert" in change.name and "shared" not in change.name):
        holders.setdefault(holder_of(change.name), []).append(change)
    return holders


def holder_of(name: str) -> str:
    """The module that a tensor is a part of: of a projection's weight or bias, the one around the projection."""
    owner, _, last = name.rpartition(".")
    return owner.rpartition(".")[0] if last in ("weight", "bias") else owner


def _propose(layer: nn.Module, path: str, *, changes: list[Change], field: Field) -> Iterator[MlpUnit]:
    """Units that these tensors may be: by each weight that may be the output projection, in each layout."""
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
    """A layer and the same layer with fewer neurons, both without weights; ``proven``: other units of the field."""

    wide: nn.Module
    narrow: nn.Module
    hidden: int
    proven: tuple[MlpUnit, ...]

    @torch.no_grad()
    def prove(self, unit: MlpUnit) -> MlpUnit | None:
        """The unit with what its proof found out; None where no module around it proves it."""
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
        inspect.signature(self.wide.get_submodule(path).forward).bind(hidden_BLD)  # before any weight is made
        wide = copy.deepcopy(self.wide.get_submodule(path)).float()
        narrow = copy.deepcopy(self.narrow.get_submodule(path)).float()
        fill_with_noise(wide)
        before = dict(wide.state_dict())
        with _Seen(wide, path, unit=unit) as seen:
            wide(hidden_BLD.clone())
        fewer, masked = dict(before), dict(before)
        for other in [own for own in self.proven if is_inside(own.path, path)] + [unit]:
            cuts = [replace(cut, name=inside(cut.name, path)) for cut in other.tensors]
            width, kept = (tensor_of(part, cuts[-1].name).shape[cuts[-1].dim] for part in (wide, narrow))
            if (width, kept) != (other.times * PROOF_WIDTH, other.times * _KEPT):
                return None
            experts = None if other.experts is None else len(before[cuts[-1].name])
            keep = _random_keep(experts, width, kept=kept, seed=2)
            fewer |= {cut.name: select_neurons(before[cut.name], cut, keep=keep) for cut in cuts}
            masked[cuts[-1].name] = mask_neurons(before[cuts[-1].name], cuts[-1], keep=keep)
        expected = _output(wide, masked, hidden_BLD=hidden_BLD)
        after = _output(narrow, fewer, hidden_BLD=hidden_BLD)
        wrong = _random_keep(experts, width, kept=kept, seed=3)
        fewer[cuts[-1].name] = select_neurons(before[cuts[-1].name], cuts[-1], keep=wrong)
        control = _output(narrow, fewer, hidden_BLD=hidden_BLD)
        if not is_same(expected, after) or is_same(expected, control) or not seen.activations:
            return None
        refit = unit.experts is None and seen.every_token
        return replace(
            unit,
            refit=refit,
            up=_find_up(wide, path, unit=unit, before=before, hidden_BLD=hidden_BLD) if refit else None,
        )


def _find_up(
    module: nn.Module, path: str, *, unit: MlpUnit, before: dict[str, Tensor], hidden_BLD: Tensor
) -> FusedSlice | None:
    """The up projection of a unit of a module at ``path``, by the module's activations with other weights."""
    seen: list[Tensor] = []

    def activations(tensors: dict[str, Tensor]) -> Tensor:
        _output(module, tensors, hidden_BLD=hidden_BLD)
        return seen.pop()

    own = replace(unit, tensors=tuple(replace(cut, name=inside(cut.name, path)) for cut in unit.tensors))
    projection = module.get_submodule(own.output)
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        found = find_up(own, before, activations=activations)
    except RUN_ERRORS:  # with weights so large; the unit itself is proven
        return None
    finally:
        handle.remove()
    if found is None:
        return None
    return FusedSlice(unit.tensors[own.tensors.index(found.tensor)], found.entry)


class _Seen:
    """Whether the activations of a unit's neurons were seen in a run, and whether every token had some."""

    def __init__(self, module: nn.Module, path: str, *, unit: MlpUnit) -> None:
        self.activations = self.every_token = False
        self._output = inside(unit.tensors[-1].name, path)
        self._width = tensor_of(module, self._output).shape[unit.tensors[-1].dim]
        self._module, self._holder, self._stacked = module, inside(unit.path, path), unit.experts is not None
        self._hooks = ExitStack()

    def __enter__(self) -> _Seen:
        if self._stacked:
            holder, weight = self._module.get_submodule(self._holder), tensor_of(self._module, self._output)
            self._hooks.enter_context(activations_of_experts(holder, weight, see=lambda _, seen: self._note(seen)))
        else:
            projection = self._module.get_submodule(self._output.rpartition(".")[0])
            self._hooks.callback(projection.register_forward_pre_hook(lambda _, args: self._note(args[0])).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _note(self, activation: Tensor) -> None:
        self.activations = activation.shape[-1] == self._width
        self.every_token = activation.shape[:-1].numel() == _TOKENS


def _random_keep(experts: int | None, width: int, *, kept: int, seed: int) -> Tensor:
    """Different neurons for each expert, in no order."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(width, generator=generator)[:kept] for _ in range(experts or 1)]
    return torch.stack(rows) if experts is not None else rows[0]


def _output(module: nn.Module, tensors: dict[str, Tensor], *, hidden_BLD: Tensor) -> Tensor:
    module.load_state_dict(tensors, assign=True)
    return hidden_states_of(module(hidden_BLD.clone()))


def is_inside(name: str, path: str) -> bool:
    """Whether a name is that of a module or of something in it; everything is in the layer itself ("")."""
    return not path or name == path or name.startswith(f"{path}.")


def inside(name: str, path: str) -> str:
    """The name as seen from a module that it is inside of."""
    return name.removeprefix(path).lstrip(".")


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name in the module."""
    owner, _, last = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), last)
    return found


def paths_around(path: str) -> Iterator[str]:
    """A module's path and those of the modules around it, up to the layer itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def hidden_states_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states that a module puts out."""
    return output[0] if isinstance(output, tuple) else output


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two outputs are equal but for rounding."""
    tolerance = 1e-4 * first.abs().max().clamp_min(1e-6)
    return bool((first - second).abs().max() <= tolerance)
