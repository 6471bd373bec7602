"""Find the units of attention: grouped by the number of key-value groups, then proven on whole layers.

The proof: a model built with fewer groups, given the weights of some groups of a wider model, has the hidden states of
the wider model with the other groups' columns of the output projections masked. Whole layers are run, so that masks,
positions and everything else that depends on the number of heads is as in a real model.

Shapes in names: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.config_probe import Change, Field, RepresentativeModel, compare_models
from llmprune.anatomy.hooks import inputs_of, outputs_of
from llmprune.anatomy.meta_model import fill_with_noise, find_layers, text_config
from llmprune.anatomy.names import holder_of
from llmprune.anatomy.proof import RUN_ERRORS, ActivationShape, equal_up_to_rounding, hidden_states_of
from llmprune.anatomy.selection import mask_neurons, select_neurons
from llmprune.anatomy.types import AttentionUnit, Heads, PrunableDim

Units = tuple[AttentionUnit | None, ...]
# Layouts of tensors in which the rows of a group are not adjacent: the parts of a tensor, by a group's number of rows.
# Arguments: inputs of the output projection of a group, and of a head.
Layout = Callable[[int, int], dict[int, tuple[int, ...]]]
_LAYOUTS: tuple[Layout, ...] = (
    lambda group, head: {},
    lambda group, head: {group + 2 * head: (group, head, head)},  # queries of all groups, their keys, their values
    lambda group, head: {2 * group: (group, group), 2 * head: (head, head)},  # queries and gates; keys and values
)

MOST_ROWS = 2**20  # of a group in one tensor
_GROUPS, _KEPT = 4, 2  # groups of the wide and of the narrow model of a proof
_MOST_QUERIES = 2  # query heads of a group in a proof; with one, heads and groups could not be distinguished
_SMALL_HIDDEN = 64
_TOKENS = 16
_LARGE = 2**22  # elements of an embedding table above which it is not made: the proof feeds noise, not tokens


def attention_units(
    field: Field, representative: RepresentativeModel, *, heads: Heads, small: Sequence[dict[str, int]]
) -> Units | str:
    """Return the proven unit of every layer of the representative model, None without attention; or a refusal.

    ``field``: the sizes that the number of groups sets; ``small``: values of config fields that make the model quick
    to run, tried in turn.
    """
    text, refusal = text_config(representative.model.config), ""
    for hidden in ({text.attribute_map.get("hidden_size", "hidden_size"): _SMALL_HIDDEN}, {}):
        built = False
        for fields in small:
            pair = _Pair.build(field, representative, heads=heads, smaller=fields | hidden)
            if isinstance(pair, str):
                refusal = refusal or pair
                continue
            built = True
            try:
                proof = pair.prove_some_layout()
            except RUN_ERRORS as error:
                why = f"{type(error).__name__}: {error}"
                refusal = f"a small model with {_GROUPS} groups of heads, or with {_KEPT}, does not run ({why})"
                continue
            if isinstance(proof, str):
                return proof
            units = _propose(representative.layers, field, queries=heads.queries, layout=proof.layout)
            return tuple(unit and replace(unit, refit=refit) for unit, refit in zip(units, proof.refits, strict=True))
        if built:
            break  # where a small model is built and does not run, a larger one does not either
    return refusal


def _propose(layers: Sequence[nn.Module] | nn.ModuleList, field: Field, *, queries: int, layout: Layout) -> Units:
    """Return the units that the changing tensors may be, in one layout; None in layers without attention."""
    return tuple(
        _unit(layer, changes, groups=field.value, queries=queries, layout=layout) if changes else None
        for layer, changes in zip(layers, field.changes, strict=True)
    )


def _unit(
    layer: nn.Module, changes: Sequence[Change], *, groups: int, queries: int, layout: Layout
) -> AttentionUnit | None:
    outputs = [change for change in changes if _is_output(layer, change)]
    if len(outputs) != 1:
        return None
    output = outputs[0]
    parts = layout(output.times, output.times // queries)
    inputs = [
        PrunableDim(change.name, change.dim, parts.get(change.times, (change.times,)))
        for change in changes
        if change is not output
    ]
    tensors = (*inputs, PrunableDim(output.name, output.dim, (output.times,)))
    return AttentionUnit(holder_of(output.name), tensors, output.times * groups, refit=False)


def _is_output(layer: nn.Module, change: Change) -> bool:
    owner, _, last = change.name.rpartition(".")
    module = layer.get_submodule(owner)
    inputs = 1 if isinstance(module, nn.Linear) else 0 if isinstance(module, Conv1D) else None
    return last == "weight" and change.dim == inputs


@dataclass(frozen=True)
class _Proof:
    """A layout for which the proof holds; ``refits``: for each layer, True if every token reaches its attention."""

    layout: Layout
    refits: list[bool]


@dataclass(frozen=True)
class _Weights:
    """State dicts for the models of a proof.

    ``masked``: for the wide model; ``fewer``: for the narrow one; ``controls``: by layer, output projections with the
    columns of other groups, which the narrow model must show as different.
    """

    masked: dict[str, Tensor]
    fewer: dict[str, Tensor]
    controls: dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class _Pair:
    """A small model, and the same model with fewer groups.

    ``field``: the sizes that the number of groups sets in them; ``queries``: query heads of a group; ``kinds``: the
    first layer of each kind.
    """

    wide: PreTrainedModel
    narrow: PreTrainedModel
    field: Field
    queries: int
    kinds: frozenset[int]

    @classmethod
    def build(
        cls, field: Field, representative: RepresentativeModel, *, heads: Heads, smaller: dict[str, int]
    ) -> _Pair | str:
        """Build the pair, with random weights in the wide model; or return the reason why it cannot be built."""
        queries = min(heads.queries, _MOST_QUERIES)
        few = replace(heads, per_group={name: min(each, queries) for name, each in heads.per_group.items()})
        wide, narrow = (representative.with_fields(smaller | few.fields(groups)) for groups in (_GROUPS, _KEPT))
        if wide is None or narrow is None:
            return f"no model can be built with {few.fields(_KEPT)}"
        found = compare_models(
            RepresentativeModel(wide, (), representative.trust_remote_code),
            narrow,
            name=field.name,
            probe=_KEPT,
            most_times=MOST_ROWS,
        )
        if found is None or found.value != _GROUPS or _places(found) != _places(field):
            return f"{field.name} set other sizes in a smaller model"
        decoder = wide.get_decoder()
        tables = [module for module in decoder.modules() if isinstance(module, nn.Embedding)]
        fill_with_noise(decoder, without=[table for table in tables if table.weight.numel() > _LARGE])
        return cls(wide, narrow, found, queries, frozenset(representative.layer_kinds))

    def prove_some_layout(self) -> _Proof | str:
        """Return the proof for the first layout that has one; or the reason why the last one has none."""
        refusal = ""
        for layout in _LAYOUTS:
            found = self.prove(layout)
            if isinstance(found, _Proof):
                return found
            refusal = found
        return refusal

    @torch.no_grad()
    def prove(self, layout: Layout) -> _Proof | str:
        """Prove a layout; or return the reason why it is not proven."""
        path, layers = find_layers(self.wide)
        units = _propose(layers, self.field, queries=self.queries, layout=layout)
        if any(unit is None for unit, changes in zip(units, self.field.changes, strict=True) if changes):
            return "no single output projection reads the attention's output"
        weights = self._weights(units, path)
        shapes = [ActivationShape(unit.width, _TOKENS) if unit else None for unit in units]
        with ExitStack() as hooks:
            for layer, unit, shape in zip(layers, units, shapes, strict=True):
                if unit and shape:
                    hooks.enter_context(inputs_of(layer.get_submodule(unit.output), shape.note))
            expected = _hidden_states(self.wide, weights.masked)
        after = _hidden_states(self.narrow, weights.fewer)
        controls = {
            index: _hidden_states(self.narrow, weights.fewer | tensors)[index]
            for index, tensors in weights.controls.items()
        }
        for index, unit in enumerate(units):
            unnoticed = index in controls and equal_up_to_rounding(controls[index], expected[index])
            if unnoticed or not equal_up_to_rounding(after[index], expected[index]):
                place = unit.path if unit else f"layer {index}"
                return f"{place}: its output is not the same when groups of heads are cut as when they are masked"
        return _Proof(layout, [bool(shape and shape.has_width and shape.has_every_token) for shape in shapes])

    def _weights(self, units: Units, path: str) -> _Weights:
        """Keep a random half of the groups of each layer, in random order."""
        before = {name: tensor for name, tensor in self.wide.state_dict().items() if not tensor.is_meta}
        weights = _Weights(dict(before), dict(before), {})
        for index, unit in enumerate(units):
            if unit is None:
                continue
            order = torch.randperm(_GROUPS, generator=torch.Generator().manual_seed(index))
            keep, others = order[:_KEPT], order[-_KEPT:]
            for prunable in unit.tensors:
                name = f"{path}.{index}.{prunable.name}"
                weights.fewer[name] = select_neurons(before[name], prunable, keep=keep)
            output = unit.tensors[-1]
            name = f"{path}.{index}.{output.name}"
            weights.masked[name] = mask_neurons(before[name], output, keep=keep)
            if index in self.kinds:
                weights.controls[index] = {name: select_neurons(before[name], output, keep=others)}
        return weights


def _hidden_states(model: PreTrainedModel, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return the hidden states [B, L, D] after each layer of a model with these tensors, on noise."""
    model.load_state_dict(tensors, strict=False, assign=True)
    hidden = text_config(model.config).hidden_size
    hidden_BLD = torch.randn(1, _TOKENS, hidden, generator=torch.Generator().manual_seed(1))
    states: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in find_layers(model)[1]:
            hooks.enter_context(outputs_of(layer, lambda output: states.append(hidden_states_of(output))))
        model.get_decoder()(inputs_embeds=hidden_BLD, use_cache=False)
    return states


def _places(field: Field) -> list[list[tuple[str, int]]]:
    return [[(change.name, change.dim) for change in changes] for changes in field.changes]
