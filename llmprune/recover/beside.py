"""The dense model beside the student, whose hidden states the student's are trained towards (arXiv 2407.14679).

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import outputs_of
from llmprune.anatomy.proof import hidden_states_of
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.layer_calls import takes_positions
from llmprune.recover.arithmetic import Arithmetic
from llmprune.recover.resident import fill
from llmprune.recover.sharding import Sharding


@dataclass(frozen=True)
class MatchingLayers:
    """The dense model, and after which of its layers each layer of the pruned one is compared.

    ``open``: opens the model, whose weights then stay in memory. ``weight``: of the mean error in the loss.
    ``channels_K``: the residual channels that the pruned model has, None for all.
    """

    open: Callable[[], Decoder]
    after: tuple[int, ...]
    weight: float
    channels_K: Tensor | None = None


def layers_after(kept: Sequence[int], layers: int) -> tuple[int, ...]:
    """Return for each kept layer the last of the removed ones behind it, or itself, of ``layers`` layers."""
    return tuple(following - 1 for following in (*kept[1:], layers))


class DenseBeside:
    """A dense model in memory, in its own type, that is not trained. With FSDP2 each process has its part."""

    def __init__(self, matching: MatchingLayers, *, arithmetic: Arithmetic, sharding: Sharding) -> None:
        decoder = matching.open()
        self._model, self._device, self._quick = decoder.skeleton, arithmetic.device, arithmetic.quick
        self._kept_logits = {"logits_to_keep": 1} if takes_positions(self._model) else {}  # they are not read
        self._layers, self._weight = [decoder.layers[index] for index in matching.after], matching.weight
        self._sharding, self._channels_K = sharding, matching.channels_K

        def prepare(module: nn.Module) -> None:
            module.requires_grad_(False)
            sharding.shard(module)

        fill(decoder, self._model.dtype, device=arithmetic.device, prepare=prepare)
        prepare(self._model)

    @contextmanager
    def compared(self, student: nn.ModuleList, ids_BL: Tensor) -> Iterator[list[Tensor]]:
        """Yield a list, which a forward pass of the student over these windows fills.

        For each of its layers it is the relative squared error of the hidden states, the mean over the tokens.
        """
        wanted = iter(self._states(ids_BL))
        errors: list[Tensor] = []
        with ExitStack() as stack:
            for layer in student:
                see = outputs_of(layer, lambda output: errors.append(_error(hidden_states_of(output), next(wanted))))
                stack.enter_context(see)
            yield errors

    def loss(self, errors: Sequence[Tensor]) -> Tensor:
        """Return the loss of the errors of all layers."""
        return self._weight * torch.stack([error.to(self._device) for error in errors]).mean()

    @torch.no_grad()
    def _states(self, ids_BL: Tensor) -> list[Tensor]:
        """Return the hidden states [B, L, D] after each matching layer."""
        found: list[Tensor] = []
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(
                    outputs_of(layer, lambda output: found.append(self._kept(hidden_states_of(output))))
                )
            with self._sharding.autocast(self._device, quick=self._quick):
                self._model(input_ids=ids_BL.to(self._device), use_cache=False, **self._kept_logits)
        return found

    def _kept(self, hidden_BLD: Tensor) -> Tensor:
        channels_K = self._channels_K
        return hidden_BLD if channels_K is None else hidden_BLD.index_select(-1, channels_K.to(hidden_BLD.device))


def _error(hidden_BLD: Tensor, wanted_BLD: Tensor) -> Tensor:
    wanted_BLD = wanted_BLD.float()
    apart_BL = (hidden_BLD.float() - wanted_BLD).square().sum(-1)
    return (apart_BL / wanted_BLD.square().sum(-1)).mean()
