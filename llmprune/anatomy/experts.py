"""Experts: the field that sets their number, every tensor with an entry for each, and the proof.

The proof: permuting the experts together with their router's rows leaves the output of the
block as it was, permuting the router's rows alone does not, and the block runs with fewer.

Shapes in names: B batch, L sequence length, D hidden size, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.config_probe import Change, Field, RepresentativeModel
from llmprune.anatomy.expert_hooks import choice_in, outputs_of_experts
from llmprune.anatomy.meta_model import Config, fill_with_noise, find_layers, text_config
from llmprune.anatomy.mlp import RUN_ERRORS, hidden_states_of, holder_of, inside, is_inside, is_same, paths_around
from llmprune.anatomy.selection import select_neurons
from llmprune.anatomy.types import ExpertBlock, Experts, PrunableDim

FEW_EXPERTS = 16  # enough to prove it, and quick
_TOKENS = 32
Blocks = tuple[ExpertBlock | None, ...]


def expert_field(fields: Sequence[Field], representative: RepresentativeModel) -> tuple[Field, Blocks] | None:
    """The field that sets the number of experts, and the block of every layer of the representative."""
    return next(((field, blocks) for field in fields if (blocks := _blocks(field, representative)) is not None), None)


def prove_experts(
    found: tuple[Field, Blocks] | None, representative: RepresentativeModel, *, small: Sequence[dict[str, int]]
) -> Experts | None:
    """The experts and whether any can be removed; None where the model has no mixture.

    ``small``: fields that make the representative quick to run; of several, the first that proves it.
    """
    config = text_config(representative.model.config)
    top_k = getattr(config, "num_experts_per_tok", None)
    if found is None:
        stacks = [tensor for name, tensor in representative.layers.named_parameters() if _is_stack(name, tensor)]
        reason = "no config field sets the number of experts and nothing else, so a model with fewer would not reload"
        return Experts("", stacks[0].shape[0], top_k, reason) if stacks else None
    field, blocks = found
    for tried in small:
        top_k, refusal = _prove(field, blocks, representative=representative, small=tried, top_k=top_k)
        if refusal is None:
            break
    return Experts(field.name, field.value, top_k, refusal)


def _is_stack(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 3 and "expert" in name


def _blocks(field: Field, representative: RepresentativeModel) -> Blocks | None:
    """The blocks whose number of experts this field sets; None where it sets something else."""
    blocks: list[ExpertBlock | None] = []
    for layer, changes in zip(representative.layers, field.changes, strict=True):
        tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
        stacks = [change for change in changes if change.dim == 0 and tensors[change.name].ndim == 3]
        holders = {holder_of(change.name) for change in stacks}
        if changes and (len(holders) != 1 or any(change.times != 1 for change in changes)):
            return None
        blocks.append(ExpertBlock(holders.pop(), _cuts(changes)) if changes else None)
    return tuple(blocks)


def _cuts(changes: Sequence[Change]) -> tuple[PrunableDim, ...]:
    return tuple(PrunableDim(change.name, change.dim) for change in changes)


def _prove(
    field: Field, blocks: Blocks, *, representative: RepresentativeModel, small: dict[str, int], top_k: int | None
) -> tuple[int | None, str | None]:
    """How many experts a token takes, and why none can be removed."""
    model = representative.with_fields(small)
    if model is None:
        return top_k, f"no model can be built with {small}"
    _, layers = find_layers(model)
    for layer, block in zip(layers, blocks, strict=True):
        if block is None:
            continue
        call = _Call(layer, block, count=small.get(field.name, field.value), config=model.config)
        try:
            refusal = call.prove()
        except RUN_ERRORS:
            refusal = f"{block.path or 'the layer'}: its block does not run on hidden states alone"
        if refusal:
            return call.top_k or top_k, refusal
        top_k = call.top_k
    fewer = representative.with_fields(small | {field.name: field.value - 1})
    return top_k, None if fewer is not None else f"no model can be built whose {field.name} is {field.value - 1}"


class _Call:
    """One block with random weights, and what its experts module is called with."""

    def __init__(self, layer: nn.Module, block: ExpertBlock, *, count: int, config: Config) -> None:
        self.layer, self.block, self.count = layer, block, count
        self.hidden = text_config(config).hidden_size
        self.top_k: int | None = None
        self.scored = False

    @torch.no_grad()
    def prove(self) -> str | None:
        """Why no expert can be removed; None where the proof holds."""
        path, before = self._run()
        cuts = [PrunableDim(inside(cut.name, path), cut.dim) for cut in self.block.tensors]
        if not self.scored:
            return (
                f"{self.block.path}: it is not told which experts each token takes, or puts out something else than "
                "their weighted sum, so they cannot be scored"
            )
        order_E = torch.randperm(self.count, generator=torch.Generator().manual_seed(2))
        if torch.equal(order_E, torch.arange(self.count)):  # as a permutation of two may be
            order_E = order_E.flip(0)
        tensors = dict(self.module.state_dict())
        permuted = {cut.name: select_neurons(tensors[cut.name], cut, keep=order_E) for cut in cuts}
        router = {name: tensor for name, tensor in permuted.items() if tensor.ndim < 3 and "expert" not in name}
        if is_same(before, self._with(tensors | router)):
            return f"{self.block.path}: its output stays as it was when the rows of its router alone are permuted"
        if not is_same(before, self._with(tensors | permuted)):
            return (
                f"{self.block.path}: its output changes when experts are permuted together with their router's rows, "
                "as where experts are routed in groups"
            )
        return None

    def _run(self) -> tuple[str, Tensor]:
        """The smallest module around the block that holds its router and runs on hidden states alone."""
        self.hidden_BLD = torch.randn(1, _TOKENS, self.hidden, generator=torch.Generator().manual_seed(1))
        error: Exception = ValueError("no module holds the experts and their router")
        for path in paths_around(self.block.path):
            if not all(is_inside(cut.name, path) for cut in self.block.tensors):
                continue
            self.module = copy.deepcopy(self.layer.get_submodule(path)).float()
            fill_with_noise(self.module)
            self._fill_buffers()
            holder = self.module.get_submodule(inside(self.block.path, path))
            handle = holder.register_forward_hook(self._note, with_kwargs=True)
            try:
                return path, hidden_states_of(self.module(self.hidden_BLD.clone()))
            except RUN_ERRORS as failed:
                error = failed
            finally:
                handle.remove()
        raise error

    def _fill_buffers(self) -> None:
        names = {cut.name.rpartition(".")[2] for cut in self.block.tensors}
        for name, buffer in self.module.named_buffers():
            if name.rpartition(".")[2] in names and buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)) / 10)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: PLR0917 - torch calls it
        """See what the experts module is told, and that its output is the sum over experts of what each adds."""
        choice = choice_in(args, kwargs)
        if choice is None or not isinstance(output, Tensor):
            return
        self.top_k = choice[1].shape[1]
        total_TD = torch.zeros_like(output)
        for _, token_T, added_TD in outputs_of_experts(module, args, kwargs=kwargs, count=self.count):
            total_TD.index_add_(0, token_T, added_TD)
        self.scored = is_same(output, total_TD)

    def _with(self, tensors: dict[str, Tensor]) -> Tensor:
        self.module.load_state_dict(tensors, assign=True)
        return hidden_states_of(self.module(self.hidden_BLD.clone()))
