"""Layer-wise backward pass: gradients of the loss, layer by layer from the last to the first.

The forward pass saved the hidden states after every layer in a ``HiddenStateCache``. Each layer is run once more on
those before it with autograd on, which turns the gradient of the loss after the layer into the gradient before it. So
a model is differentiated with the memory of one layer and one batch; weights get no gradients.

The loss is the next-token cross entropy, summed over the tokens of a window: not the mean, so that small gradients of
long windows do not underflow in half precision. The prediction of a begin-of-text token does not count in it.

Shapes: B batch, L sequence length, D hidden size, F inputs of a projection, P positions of a
chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of
from llmprune.common.errors import DiskError, ModelError
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.logits import token_chunks

_IGNORED = -100  # a target without a loss


@dataclass(frozen=True)
class Effects:
    """One batch: the effects x · ∂loss/∂x at the input x of each module, float32 [B, L, F].

    ``norm_BL1``: the norm of each token's gradient after the layer, infinite where it is zero.
    """

    values: list[Tensor]
    norm_BL1: Tensor


class NotDifferentiableError(ModelError):
    """A layer through which no gradient passes."""


class LayerwiseBackward:
    """Gradients of the loss with respect to the hidden states, from the last layer to the first.

    ``forward`` has passed the last layer, and ``cache`` has its hidden states after every layer.
    """

    def __init__(self, forward: LayerwiseForward, cache: HiddenStateCache) -> None:
        self.forward, self._cache = forward, cache
        self._gradients = forward.copy()
        for batch in range(len(forward.batches)):
            self._gradients[batch] = _gradient_of_loss(forward, batch)

    def effects(self, index: int, layer: nn.Module, *, modules: Sequence[nn.Module]) -> Iterator[Effects]:
        """Yield by batch the effects at the inputs of the modules.

        To be called for every layer from the last to the first: it computes the gradients before the layer. Every
        token must pass each module once. Raises NotDifferentiableError if the layer cannot be differentiated.
        """
        self._restore_before(index)
        device = self.forward.decoder.device_of(index)
        for batch in range(len(self.forward.batches)):
            hidden_BLD = self.forward.hidden_states.at(batch, device).detach().requires_grad_()
            inputs, output_BLD = self._run(batch, index, layer=layer, modules=modules, hidden_BLD=hidden_BLD)
            gradient_BLD = self._gradients.at(batch, device)
            before_BLD, *gradients = torch.autograd.grad(output_BLD, [hidden_BLD, *inputs], gradient_BLD)
            shape = hidden_BLD.shape[:2]
            pairs = zip(inputs, gradients, strict=True)
            values = [(value.detach().float() * gradient.float()).view(*shape, -1) for value, gradient in pairs]
            norm_BL1 = gradient_BLD.float().norm(dim=-1, keepdim=True)
            norm_BL1 = norm_BL1.where(norm_BL1 > 0, math.inf)  # tokens with zero gradient contribute nothing
            self._gradients[batch] = before_BLD  # overwrites gradient_BLD if the buffer is a file
            yield Effects(values, norm_BL1)

    def _restore_before(self, index: int) -> None:
        """Set the hidden states to those before a layer."""
        if not index:
            self.forward.restart()
        elif not self._cache.restore(index - 1, self.forward.hidden_states):
            raise DiskError(
                f"the hidden states that pass 1 saved in {self._cache.folder} are missing; run the same command again"
            )

    @torch.enable_grad()
    def _run(
        self, batch: int, index: int, *, layer: nn.Module, modules: Sequence[nn.Module], hidden_BLD: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Run the layer with autograd on; return the input of each module and the layer's output [B, L, D]."""
        seen: list[list[Tensor]] = [[] for _ in modules]  # in the order of ``modules``, not of their calls
        with ExitStack() as hooks:
            for module, own in zip(modules, seen, strict=True):
                hooks.enter_context(inputs_of(module, own.append))
            # a copy: a layer may change its input in place
            output_BLD = self.forward.calls[batch][index].run(layer, hidden_BLD.clone())
        inputs = [value for own in seen for value in own]
        if any(len(own) != 1 for own in seen) or not all(value.requires_grad for value in (*inputs, output_BLD)):
            raise NotDifferentiableError(
                f"layer {index} ({type(layer).__name__}) cannot be differentiated; choose a width.criterion that "
                "needs no gradients, such as activation"
            )
        return inputs, output_BLD


def _gradient_of_loss(forward: LayerwiseForward, batch: int) -> Tensor:
    """Return ∂loss/∂(hidden states after the last layer) [B, L, D], one window at a time because logits are large.

    The logits of a large vocabulary are computed in chunks of tokens, and the gradients of the chunks are added up:
    those of one chunk are zero at the tokens of the others.
    """
    device, gradients = forward.decoder.device, []
    counted_BT = forward.targets.of(batch, device)
    hidden_BLD = forward.hidden_states.at(batch, device)
    for window, ids_L in enumerate(forward.token_ids(batch)):
        ids_1L = ids_L.unsqueeze(0)
        hidden_1LD = hidden_BLD[window : window + 1].detach().requires_grad_()
        gradient_1LD: Tensor | None = None
        with torch.enable_grad():
            for chunk in token_chunks(forward, ids_1L):
                logits_PV = chunk.next_token_logits(forward, ids_1L, hidden_BLD=hidden_1LD)[0].float()
                targets_P = chunk.targets(ids_1L)[0]
                if counted_BT is not None:
                    targets_P = targets_P.where(counted_BT[window, chunk.positions], _IGNORED)
                loss = nn.functional.cross_entropy(logits_PV, targets_P, reduction="sum", ignore_index=_IGNORED)
                (part_1LD,) = torch.autograd.grad(loss, hidden_1LD)
                gradient_1LD = part_1LD if gradient_1LD is None else gradient_1LD + part_1LD
        assert gradient_1LD is not None, "every window has a token"
        gradients.append(gradient_1LD)
    return torch.cat(gradients)
