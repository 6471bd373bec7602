"""The walk back: gradients of the loss, layer by layer from the last to the first.

Pass 1 left the hidden states before every layer in its trail. Each layer is run once more on them with its
operations recorded, and the gradient of the loss after it becomes the gradient before it. So a model
is differentiated with the memory of one layer and one batch; weights get no gradients.

The loss is the next-token cross entropy, summed over the tokens of a window: sums, so that small gradients of
long windows do not vanish in half precision.

Shapes: B batch, L sequence length, D hidden size, F inputs of a projection, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmprune.common.errors import DiskError, ModelError
from llmprune.layerwise.forward import LayerwiseForward, inputs_of
from llmprune.layerwise.hidden_states import HiddenStateCache


class LayerwiseBackward:
    """Gradients of the loss with respect to the hidden states, beginning after the last layer.

    ``walk`` has left the last layer. ``trail`` has what it left behind every layer. ``relative``: effects are over the
    norm of the token's gradient after the layer.
    """

    def __init__(self, walk: LayerwiseForward, trail: HiddenStateCache, *, relative: bool = False) -> None:
        self.walk, self._trail, self._relative = walk, trail, relative
        self._gradients = walk.copy()
        for batch in range(len(walk.batches)):
            self._gradients[batch] = _gradient_of_loss(walk, batch)

    def effects(self, index: int, layer: nn.Module, *, modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
        """Effects x · ∂loss/∂x at the input x of each module [B, L, F], float32, batch by batch.

        Layers are visited from the last to the first; a visit brings the gradients before its layer. Every token
        goes through each module once. Raises ModelError where the layer cannot be differentiated.
        """
        self._go_before(index)
        for batch, stream_BLD in enumerate(self.walk.streams):
            device = self.walk.decoder.device_of(index)
            hidden_BLD = stream_BLD.to(device).detach().requires_grad_()
            inputs, output_BLD = self._run(batch, index, layer=layer, modules=modules, hidden_BLD=hidden_BLD)
            gradient_BLD = self._gradients[batch].to(device)
            before_BLD, *gradients = torch.autograd.grad(output_BLD, [hidden_BLD, *inputs], gradient_BLD)
            shape = hidden_BLD.shape[:2]
            pairs = zip(inputs, gradients, strict=True)
            effects = [(value.detach().float() * gradient.float()).view(*shape, -1) for value, gradient in pairs]
            if self._relative:
                norm_BL1 = gradient_BLD.float().norm(dim=-1, keepdim=True)
                norm_BL1 = norm_BL1.where(norm_BL1 > 0, math.inf)  # what no loss hangs on has no effect
                effects = [effect_BLF.div_(norm_BL1) for effect_BLF in effects]
            self._gradients[batch] = before_BLD  # in a file these are one with gradient_BLD
            yield effects

    def _go_before(self, index: int) -> None:
        """Put the walk's streams where they were before a layer."""
        if not index:
            self.walk.restart()
        elif not self._trail.restore(index - 1, self.walk.streams):
            raise DiskError(
                f"the hidden states that pass 1 left in {self._trail.folder} are gone; run the same command again"
            )

    @torch.enable_grad()
    def _run(
        self, batch: int, index: int, *, layer: nn.Module, modules: Sequence[nn.Module], hidden_BLD: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The input of each module and the output of the layer, with the operations between them recorded."""
        seen: list[list[Tensor]] = [[] for _ in modules]  # whatever the order in which the layer calls them
        with ExitStack() as hooks:
            for module, own in zip(modules, seen, strict=True):
                hooks.enter_context(inputs_of(module, own.append))
            # a copy, for a layer may change what it is given in place
            output_BLD = self.walk.calls[batch][index].run(layer, hidden_BLD.clone())
        inputs = [value for own in seen for value in own]
        if any(len(own) != 1 for own in seen) or not all(value.requires_grad for value in (*inputs, output_BLD)):
            raise ModelError(
                f"layer {index} ({type(layer).__name__}) cannot be differentiated; choose a width.criterion that "
                "needs no gradients, such as activation"
            )
        return inputs, output_BLD


def _gradient_of_loss(walk: LayerwiseForward, batch: int) -> Tensor:
    """∂loss/∂hidden states after the last layer [B, L, D], a window at a time: logits are large."""
    gradients: list[Tensor] = []
    for window, ids_L in enumerate(walk.batches[batch]):
        hidden_1LD = walk.streams[batch][window : window + 1].to(walk.decoder.device).detach().requires_grad_()
        with torch.enable_grad():
            logits_LV = walk.logits_of(ids_L.unsqueeze(0), hidden_1LD)[0, :-1].float()
            loss = nn.functional.cross_entropy(logits_LV, ids_L[1:].to(logits_LV.device), reduction="sum")
        gradients += torch.autograd.grad(loss, hidden_1LD)
    return torch.cat(gradients)
