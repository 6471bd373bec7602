"""Units of attention: grouped from what the number of key-value groups sets, then proven on whole layers.

The proof: a model built with fewer groups, given the weights of some groups of a wider one, has the hidden states
that the wider one has when the other groups' columns of its output projections are masked. Whole layers run, so
that masks, positions and whatever else may depend on the number of heads are what they will be.

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

from llmprune.anatomy.config_probe import Change, Field, RepresentativeModel, compare
from llmprune.anatomy.meta_model import fill_with_noise, find_layers, text_config
from llmprune.anatomy.mlp import RUN_ERRORS, hidden_states_of, holder_of, is_same
from llmprune.anatomy.selection import mask_neurons, select_neurons
from llmprune.anatomy.types import AttentionUnit, Heads, PrunableDim

Units = tuple[AttentionUnit | None, ...]
# How tensors lie in which a group's rows are not side by side: their parts by a group's number of rows, given the
# inputs of the output projection that are a group's, and those that are a head's.
Layout = Callable[[int, int], dict[int, tuple[int, ...]]]
_LAYOUTS: tuple[Layout, ...] = (
    lambda read, head: {},
    lambda read, head: {read + 2 * head: (read, head, head)},  # the queries of all groups, their keys, their values
    lambda read, head: {2 * read: (read, read), 2 * head: (head, head)},  # queries and gates; keys and values
)

MOST_ROWS = 2**20  # of a group in one tensor
_GROUPS, _KEPT = 4, 2  # of the model that is proven: how many groups it has, and how many of them stay
_MOST_QUERIES = 2  # query heads of a group there; with one alone, heads and groups could not be told apart
_SMALL_HIDDEN = 64
_TOKENS = 16
_LARGE = 2**22  # entries of a table of embeddings that is not made: noise goes in instead of tokens


def attention_units(
    field: Field, representative: RepresentativeModel, *, heads: Heads, small: Sequence[dict[str, int]]
) -> Units | str:
    """The proven unit of every layer of the representative that has attention; or why there are none.

    ``field``: what the number of groups sets. ``small``: fields that make the representative quick to run.
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
                proven = pair.prove_some()
            except RUN_ERRORS as error:
                why = f"{type(error).__name__}: {error}"
                refusal = f"a small model with {_GROUPS} groups of heads, or with {_KEPT}, does not run ({why})"
                continue
            if isinstance(proven, str):
                return proven
            layout, refits = proven
            units = _propose(representative.layers, field, queries=heads.queries, layout=layout)
            return tuple(unit and replace(unit, refit=refit) for unit, refit in zip(units, refits, strict=True))
        if built:
            break  # where a smaller model was built and does not run, the larger one does not either
    return refusal


def _propose(layers: Sequence[nn.Module] | nn.ModuleList, field: Field, *, queries: int, layout: Layout) -> Units:
    """The units that these tensors may be, None in layers without attention."""
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
    fused = layout(output.times, output.times // queries)
    inputs = [
        PrunableDim(change.name, change.dim, fused.get(change.times, (change.times,)))
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
class _Pair:
    """A small model and the same with fewer groups, with the same random weights but for the attention's."""

    wide: PreTrainedModel
    narrow: PreTrainedModel
    field: Field  # what the number of groups sets in them
    queries: int
    kinds: frozenset[int]  # the first layer of each kind

    @classmethod
    def build(
        cls, field: Field, representative: RepresentativeModel, *, heads: Heads, smaller: dict[str, int]
    ) -> _Pair | str:
        """The pair, or why there is none."""
        queries = min(heads.queries, _MOST_QUERIES)
        few = replace(heads, per_group={name: min(each, queries) for name, each in heads.per_group.items()})
        wide, narrow = (representative.with_fields(smaller | few.fields(groups)) for groups in (_GROUPS, _KEPT))
        if wide is None or narrow is None:
            return f"no model can be built with {few.fields(_KEPT)}"
        found = compare(
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

    def prove_some(self) -> tuple[Layout, list[bool]] | str:
        """The layout that proves the groups, and for each layer what ``prove`` says; or why none does."""
        refusal = ""
        for layout in _LAYOUTS:
            found = self.prove(layout)
            if isinstance(found, list):
                return layout, found
            refusal = found
        return refusal

    @torch.no_grad()
    def prove(self, layout: Layout) -> list[bool] | str:
        """Whether every token goes through the attention of each layer; or why its groups are not proven."""
        path, layers = find_layers(self.wide)
        units = _propose(layers, self.field, queries=self.queries, layout=layout)
        if any(unit is None for unit, changes in zip(units, self.field.changes, strict=True) if changes):
            return "no single output projection reads what its heads attend to"
        before = {name: tensor for name, tensor in self.wide.state_dict().items() if not tensor.is_meta}
        masked, fewer, wrong = dict(before), dict(before), {}
        for index, unit in enumerate(units):
            order = torch.randperm(_GROUPS, generator=torch.Generator().manual_seed(index))
            keep, others = order[:_KEPT], order[-_KEPT:]
            name = ""
            for cut in unit.tensors if unit else ():
                name = f"{path}.{index}.{cut.name}"
                fewer[name] = select_neurons(before[name], cut, keep=keep)
            if unit:  # of whose tensors the last is the output projection
                masked[name] = mask_neurons(before[name], unit.tensors[-1], keep=keep)
            if unit and index in self.kinds:
                wrong[index] = {name: select_neurons(before[name], unit.tensors[-1], keep=others)}
        with ExitStack() as hooks:
            seen = [
                _Seen(layer, unit, hooks=hooks) if unit else None for layer, unit in zip(layers, units, strict=True)
            ]
            expected = _hidden_states(self.wide, masked)
        after = _hidden_states(self.narrow, fewer)
        controls = {index: _hidden_states(self.narrow, fewer | tensors)[index] for index, tensors in wrong.items()}
        for index, unit in enumerate(units):
            control = controls.get(index)
            if not is_same(expected[index], after[index]) or (
                control is not None and is_same(expected[index], control)
            ):
                place = unit.path if unit else f"layer {index}"
                return f"{place}: its output is not the same when groups of heads are cut as when they are masked"
        return [own is not None and own.every_token for own in seen]


class _Seen:
    """Whether every token's heads were seen to go through the output projection in a run."""

    def __init__(self, layer: nn.Module, unit: AttentionUnit, *, hooks: ExitStack) -> None:
        self.every_token, self._width = False, unit.width
        hooks.callback(layer.get_submodule(unit.output).register_forward_pre_hook(self._note).remove)

    def _note(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.every_token = args[0].shape[-1] == self._width and args[0].shape[:-1].numel() == _TOKENS


def _hidden_states(model: PreTrainedModel, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states [B, L, D] after each layer, of a model with these tensors, on noise."""
    model.load_state_dict(tensors, strict=False, assign=True)
    hidden = text_config(model.config).hidden_size
    hidden_BLD = torch.randn(1, _TOKENS, hidden, generator=torch.Generator().manual_seed(1))
    states: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in find_layers(model)[1]:
            hooks.callback(
                layer.register_forward_hook(lambda _, __, output: states.append(hidden_states_of(output))).remove
            )
        model.get_decoder()(inputs_embeds=hidden_BLD, use_cache=False)
    return states


def _places(field: Field) -> list[list[tuple[str, int]]]:
    return [[(change.name, change.dim) for change in changes] for changes in field.changes]
