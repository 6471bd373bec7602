"""Proof that experts of one block can be removed: its output does not depend on their order.

Permuting the experts together with their router's rows does not change the output of the block, permuting the router's
rows alone does. Where a router chooses groups of experts first (DeepSeek-V2, arXiv 2405.04434), this holds for
permutations of the groups and of the experts within each group alone.

Shapes in names: B batch, L sequence length, T tokens, D hidden size, E experts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.expert_hooks import choice_in, outputs_of_experts
from llmprune.anatomy.meta_model import fill_with_noise
from llmprune.anatomy.names import is_inside, paths_around, relative_name
from llmprune.anatomy.proof import RUN_ERRORS, equal_up_to_rounding, hidden_states_of
from llmprune.anatomy.selection import select_neurons
from llmprune.anatomy.types import ExpertBlock, PrunableDim

_TOKENS = 31  # a prime: a router that misreads its groups cannot reshape its scores by chance


@dataclass(frozen=True)
class Outcome:
    """Outcome of the proof for one block and one number of groups.

    ``refusal``: the reason why no expert can be removed; None where the proof holds. ``depends_on_order``: it fails for
    the order of the experts, so another number of groups may hold. ``top_k``: experts that a token is routed to, as the
    run showed; None before it. ``uses_all``: every token is routed to that many different experts, with a weight.
    """

    refusal: str | None
    depends_on_order: bool = False
    top_k: int | None = None
    uses_all: bool = False


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


class BlockProof:
    """The proof for one block of ``count`` experts, with random weights. ``hidden``: the hidden size D."""

    def __init__(self, layer: nn.Module, block: ExpertBlock, *, count: int, hidden: int) -> None:
        self._layer, self._block, self._count, self._hidden = layer, block, count, hidden
        self._is_weighted_sum = self._uses_all = False
        self._top_k: int | None = None

    @torch.no_grad()
    def prove(self, groups: int) -> Outcome:
        """Return the outcome for experts in a number of groups, each of consecutive experts."""
        try:
            run = self._first_run()
        except RUN_ERRORS:
            return self._outcome("its block does not run on hidden states alone")
        if not self._is_weighted_sum:
            return self._outcome(
                "it is not told which experts each token is routed to, or its output is not their weighted sum, so "
                "they cannot be scored"
            )
        tensors, permuted = dict(run.module.state_dict()), self._permuted(run, groups)
        router = {name: tensor for name, tensor in permuted.items() if tensor.ndim < 3 and "expert" not in name}
        if self._count > 1 and equal_up_to_rounding(run.again(tensors | router), run.output):
            return self._outcome("its output does not change when the rows of its router alone are permuted")
        if equal_up_to_rounding(run.again(tensors | permuted), run.output):
            return self._outcome(None)
        within = f" in each of {groups} groups" if groups > 1 else ""
        return self._outcome(
            f"its output changes when experts{within} are permuted together with their router's rows",
            depends_on_order=True,
        )

    def _outcome(self, reason: str | None, *, depends_on_order: bool = False) -> Outcome:
        refusal = None if reason is None else f"{self._block.path or 'the layer'}: {reason}"
        return Outcome(refusal, depends_on_order, self._top_k, self._uses_all)

    def _permuted(self, run: _Run, groups: int) -> dict[str, Tensor]:
        """Return the block's tensors with the groups, and the experts of each group, in another order."""
        order_E, tensors = _order(self._count, groups), run.module.state_dict()
        own = [PrunableDim(relative_name(prunable.name, run.path), prunable.dim) for prunable in self._block.tensors]
        return {prunable.name: select_neurons(tensors[prunable.name], prunable, keep=order_E) for prunable in own}

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
        self._top_k = choice.index_TK.shape[1]
        sorted_TK = choice.index_TK.sort(1).values
        self._uses_all = bool((choice.weight_TK != 0).all() and (sorted_TK.diff(dim=1) > 0).all())
        total_TD = torch.zeros_like(output)
        for part in outputs_of_experts(module, args, kwargs=kwargs, count=self._count):
            total_TD.index_add_(0, part.token_T, part.output_TD)
        self._is_weighted_sum = equal_up_to_rounding(total_TD, output)


def _order(count: int, groups: int) -> Tensor:
    """Return a random order of the groups with a random order of the experts in each, int64 [E]; never the identity."""
    generator = torch.Generator().manual_seed(2)
    size = count // groups
    within = torch.stack([torch.randperm(size, generator=generator) for _ in range(groups)])
    order_E = (within + torch.arange(groups).unsqueeze(1) * size)[_other_order(groups, generator)].flatten()
    return order_E.flip(0) if torch.equal(order_E, torch.arange(count)) else order_E


def _other_order(count: int, generator: torch.Generator) -> Tensor:
    """Return a random order of several, which is not the identity."""
    order = torch.randperm(count, generator=generator)
    return order.flip(0) if torch.equal(order, torch.arange(count)) else order
