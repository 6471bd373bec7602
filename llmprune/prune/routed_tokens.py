"""Tokens of one layer by the experts that they are routed to, recorded in a run of the layer.

The hidden states that the experts get are stored like other hidden states; the routing is small and stays on the host.
Activations of one expert are computed from them when they are needed, so that those of one expert at a time exist.

Shapes: B batch, L sequence length, T tokens, K experts that a token is routed to, D hidden size, F neurons of an
expert, E experts, G groups of windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.expert_hooks import ExpertChoice, activations_of_experts, choice_in
from llmprune.anatomy.types import MlpUnit
from llmprune.common.distributed import sum_over_processes
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.window_groups import WindowGroups


class RoutedTokens:
    """Hidden states and routing of all batches of ``forward`` in one layer, whose experts are ``unit``."""

    def __init__(self, forward: LayerwiseForward, unit: MlpUnit) -> None:
        self._forward, self._unit = forward, unit
        self._hidden: dict[str, HiddenStates] = {}
        self._index: list[Tensor] = []
        self._weight: list[Tensor] = []
        self._call: tuple[ExpertChoice, tuple[Any, ...], Mapping[str, Any]] | None = None

    @contextmanager
    def recorded(self, layer: nn.Module) -> Iterator[None]:
        """Record every run of the layer, batch by batch, while the context lasts."""
        module = layer.get_submodule(self._unit.path)
        handle = module.register_forward_pre_hook(self._record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: PLR0917 - torch calls it
        choice = choice_in(args, kwargs)
        assert choice is not None, "discovery has seen the routing"
        windows = len(self._forward.batches[len(self._index)])
        hidden_BLD = choice.hidden_TD.view(windows, -1, choice.hidden_TD.shape[1])
        self._forward.append(self._hidden, "hidden", value_BLX=hidden_BLD)
        self._index.append(choice.index_TK.cpu())
        self._weight.append(choice.weight_TK.float().cpu())
        if self._call is None:
            self._call = choice, args, kwargs

    @property
    def batches(self) -> range:
        """Numbers of the batches."""
        return range(len(self._index))

    def hidden_states(self, batch: int, device: torch.device) -> Tensor:
        """Return the hidden states [T, D] that the experts get of one batch."""
        return self._hidden["hidden"].at(batch, device).flatten(0, 1)

    def routed_to(self, batch: int, expert: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the tokens of a batch that an expert gets, int64 [T], and the weights of its output, float32 [T]."""
        token_T, place_T = (self._index[batch] == expert).nonzero(as_tuple=True)
        return token_T.to(device), self._weight[batch][token_T, place_T].to(device)

    def activations(self, layer: nn.Module, expert: int, *, hidden_TD: Tensor) -> Tensor:
        """Return the activations [T, F] of one expert's neurons, which are the inputs of its output projection."""
        assert self._call is not None, "recorded before"
        output = self._unit.tensors[-1]
        module, weight = layer.get_submodule(self._unit.path), layer.get_parameter(output.name)
        if not len(hidden_TD):
            return hidden_TD.new_zeros(0, weight.shape[output.dim])
        choice, args, kwargs = self._call
        index_T1 = torch.full((len(hidden_TD), 1), expert, dtype=choice.index_TK.dtype, device=hidden_TD.device)
        alone = ExpertChoice(hidden_TD, index_T1, choice.weight_TK.new_ones(len(hidden_TD), 1))
        seen = list[Tensor]()
        with activations_of_experts(
            module, weight, see=lambda one, value: seen.append(value) if one == expert else None
        ):
            choice.run(module.forward, args, kwargs=kwargs, replaced=alone)
        activation_TF = torch.cat(seen)
        assert len(activation_TF) == len(hidden_TD), "every token reaches the expert"
        return activation_TF

    def counts(self, experts: int, folds: WindowGroups) -> Tensor:
        """Return the tokens of every expert in every group of windows, of all processes, int64 [E, G]."""
        counts_EG = torch.zeros(experts, folds.count, dtype=torch.int64)
        for batch, index_TK in enumerate(self._index):
            group_T = folds.of_tokens(batch, len(index_TK))
            for group in range(folds.count):
                counts_EG[:, group] += torch.bincount(index_TK[group_T == group].flatten(), minlength=experts)[:experts]
        sum_over_processes([counts_EG])
        return counts_EG
