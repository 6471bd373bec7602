"""Find the experts of mixtures: the field that sets their number, their tensors, and the proof of removal.

The proof: permuting the experts together with their router's rows does not change the output of the block, permuting
the router's rows alone does, and a model with fewer experts can be built.

Shapes in names: B batch, L sequence length, T tokens, D hidden size, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.config_probe import Change, Field, RepresentativeModel
from llmprune.anatomy.expert_hooks import choice_in, outputs_of_experts
from llmprune.anatomy.meta_model import Config, fill_with_noise, find_layers, text_config
from llmprune.anatomy.names import holder_of, is_inside, paths_around, relative_name
from llmprune.anatomy.proof import RUN_ERRORS, equal_up_to_rounding, hidden_states_of
from llmprune.anatomy.selection import select_neurons
from llmprune.anatomy.types import ExpertBlock, Experts, PrunableDim

FEW_EXPERTS = 16  # enough for the proof, and quick
_TOKENS = 32
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
        experts = _prove(experts, blocks, representative=representative, small=fields)
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


def _prove(experts: Experts, blocks: Blocks, *, representative: RepresentativeModel, small: dict[str, int]) -> Experts:
    """Return the experts with the top k that their blocks use, and with the outcome of the proof."""
    model = representative.with_fields(small)
    if model is None:
        return replace(experts, refusal=f"no model can be built with {small}")
    _, layers = find_layers(model)
    for layer, block in zip(layers, blocks, strict=True):
        if block is None:
            continue
        proof = _BlockProof(layer, block, count=small.get(experts.field, experts.count), config=model.config)
        try:
            refusal = proof.prove()
        except RUN_ERRORS:
            refusal = f"{block.path or 'the layer'}: its block does not run on hidden states alone"
        if refusal:
            return replace(experts, top_k=proof.top_k or experts.top_k, refusal=refusal)
        experts = replace(experts, top_k=proof.top_k)
    fewer = representative.with_fields(small | {experts.field: experts.count - 1})
    refusal = None if fewer is not None else f"no model can be built whose {experts.field} is {experts.count - 1}"
    return replace(experts, refusal=refusal)


@dataclass(frozen=True)
class _Run:
    """A module at ``path`` with random weights that contains a block and its router, its input, and its output."""

    path: str
    module: nn.Module
    hidden_BLD: Tensor
    output: Tensor

    def again(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the output with other tensors."""
        self.module.load_state_dict(tensors, assign=True)
        return hidden_states_of(self.module(self.hidden_BLD.clone()))


class _BlockProof:
    """The proof for one block, with random weights.

    ``top_k``: the number of experts that a token is routed to, as the block's run showed; None before it.
    """

    def __init__(self, layer: nn.Module, block: ExpertBlock, *, count: int, config: Config) -> None:
        self._layer, self._block, self._count = layer, block, count
        self._hidden = text_config(config).hidden_size
        self._is_weighted_sum = False
        self.top_k: int | None = None

    @torch.no_grad()
    def prove(self) -> str | None:
        """Return the reason why no expert can be removed; None where the proof holds."""
        run = self._first_run()
        if not self._is_weighted_sum:
            return (
                f"{self._block.path}: it is not told which experts each token is routed to, or its output is not their "
                "weighted sum, so they cannot be scored"
            )
        prunables = [
            PrunableDim(relative_name(prunable.name, run.path), prunable.dim) for prunable in self._block.tensors
        ]
        order_E = torch.randperm(self._count, generator=torch.Generator().manual_seed(2))
        if torch.equal(order_E, torch.arange(self._count)):  # a random order of two experts may be the identity
            order_E = order_E.flip(0)
        tensors = dict(run.module.state_dict())
        permuted = {
            prunable.name: select_neurons(tensors[prunable.name], prunable, keep=order_E) for prunable in prunables
        }
        router = {name: tensor for name, tensor in permuted.items() if tensor.ndim < 3 and "expert" not in name}
        if equal_up_to_rounding(run.again(tensors | router), run.output):
            return f"{self._block.path}: its output does not change when the rows of its router alone are permuted"
        if not equal_up_to_rounding(run.again(tensors | permuted), run.output):
            return (
                f"{self._block.path}: its output changes when experts are permuted together with their router's rows, "
                "which happens where experts are routed in groups"
            )
        return None

    def _first_run(self) -> _Run:
        """Run the smallest module around the block that contains its router and runs on hidden states alone."""
        hidden_BLD = torch.randn(1, _TOKENS, self._hidden, generator=torch.Generator().manual_seed(1))
        error: Exception = ValueError("no module contains the experts and their router")
        for path in paths_around(self._block.path):
            if not all(is_inside(prunable.name, path) for prunable in self._block.tensors):
                continue
            module = copy.deepcopy(self._layer.get_submodule(path)).float()
            fill_with_noise(module)
            self._fill_buffers(module)
            holder = module.get_submodule(relative_name(self._block.path, path))
            handle = holder.register_forward_hook(self._observe, with_kwargs=True)
            try:
                return _Run(path, module, hidden_BLD, hidden_states_of(module(hidden_BLD.clone())))
            except RUN_ERRORS as failed:
                error = failed
            finally:
                handle.remove()
        raise error

    def _fill_buffers(self, module: nn.Module) -> None:
        names = {prunable.name.rpartition(".")[2] for prunable in self._block.tensors}
        for name, buffer in module.named_buffers():
            if name.rpartition(".")[2] in names and buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)) / 10)

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: PLR0917 - torch calls it
        """Record the top k of the routing, and whether the output is the weighted sum of the experts' outputs."""
        choice = choice_in(args, kwargs)
        if choice is None or not isinstance(output, Tensor):
            return
        self.top_k = choice.index_TK.shape[1]
        total_TD = torch.zeros_like(output)
        for part in outputs_of_experts(module, args, kwargs=kwargs, count=self._count):
            total_TD.index_add_(0, part.token_T, part.output_TD)
        self._is_weighted_sum = equal_up_to_rounding(total_TD, output)
