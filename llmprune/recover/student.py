"""The pruned model under training: all of it on one device, or sharded over the processes by torch's FSDP2.

Layers come from the files one by one, and are sharded as they come, so that no process holds the whole model. Trained
weights are float32 (for LoRA the adapters; the frozen weights keep the type of the computation), and products are
computed in bfloat16 where the device is fast at that. Embeddings and head are frozen unless the recipe asks for them:
Adam moves the rows of tokens that a step hardly has as far as all others, and the model forgets them. Dropout and the
auxiliary losses of training are off, so that a step depends on its windows alone. Weights that are zero before the
training stay zero.

Shapes: B batch, L sequence length, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmprune.checkpoint.skeleton import tensors_of
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.recipe.recover import Recover
from llmprune.recover.adapters import add_adapters, merged
from llmprune.recover.arithmetic import Arithmetic
from llmprune.recover.resident import fill
from llmprune.recover.sharding import Sharding, local, whole
from llmprune.recover.zeros import zeros_of

BETAS = (0.9, 0.95)  # of AdamW


class Student:
    """A model under training. ``decoder``: of the repaired model, whose skeleton becomes the trained model.

    ``trained``: the parameters that are trained, by name: with FSDP2 this process's part of each; ``optimizer``: AdamW
    for them, without weight decay.
    """

    def __init__(self, decoder: Decoder, settings: Recover, *, arithmetic: Arithmetic) -> None:
        self.model: PreTrainedModel = decoder.skeleton
        self.layers_path, self.layers = decoder.layers_path, decoder.layers
        self.arithmetic, self._has_adapters = arithmetic, settings.method == "lora"
        dtype = self.model.dtype if self._has_adapters else torch.float32
        self._zeros: list[dict[str, Tensor]] = []  # of each layer
        self.model.requires_grad_(not self._has_adapters)
        self.sharding = Sharding()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.data.seed)
            fill(decoder, dtype, device=arithmetic.device, prepare=lambda layer: self._prepare(layer, settings))
        if not settings.embeddings:
            self._freeze_embeddings()
        self.sharding.shard(self.model)
        self.trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        parameters = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0, fused=True)
        self._masked = [] if self._has_adapters else self._zeros_of_trained()

    def _prepare(self, layer: nn.Module, settings: Recover) -> None:
        """Find the zeros of a layer, and make it one that is trained."""
        self._zeros.append(zeros_of(layer.named_parameters()))
        layer.requires_grad_(not self._has_adapters)
        if self._has_adapters:
            add_adapters(layer, settings.lora, zeros=self._zeros[-1])
        if self.arithmetic.save_memory:
            layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        self.sharding.shard(layer)

    def _freeze_embeddings(self) -> None:
        """Leave the matrices outside the layers as they are; norms there are trained."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1 and not name.startswith(f"{self.layers_path}."):
                parameter.requires_grad_(False)

    def _zeros_of_trained(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the trained sparse matrices, with the zeros of this process's part of each."""
        sparse = {f"{self.layers_path}.{index}.{name}" for index, zeros in enumerate(self._zeros) for name in zeros}
        return [(one, local(one.detach()) == 0) for name, one in self.trained.items() if name in sparse]

    def logits(self, ids_BL: Tensor, *, quick: bool = True) -> Tensor:
        """Return the logits [B, L, V] of some windows. ``quick``: with the products of the training."""
        with self.sharding.autocast(self.arithmetic.device, quick=quick and self.arithmetic.quick):
            output: Any = self.model(input_ids=ids_BL.to(self.arithmetic.device), use_cache=False)
        logits_BLV: Tensor = output.logits
        return logits_BLV

    def clip_gradients(self, largest: float) -> float:
        """Set the gradients of zeros to zero, scale all to a norm of at most ``largest``; return the norm before."""
        for parameter, zero_X in self._masked:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(zero_X, 0.0)
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), largest)
        return float(whole(norm))

    def layer_tensors(self, index: int) -> Tensors:
        """Return the tensors of a layer by name, whole, merged and on the CPU; every process calls it."""
        tensors = _whole(self.layers[index])
        if not self._has_adapters:
            return tensors
        zeros = {name: zero_X.cpu() for name, zero_X in self._zeros[index].items()}
        return merged(tensors, self.layers[index], zeros=zeros)

    def rest_tensors(self) -> Tensors:
        """Return the tensors outside the layers by name, whole and on the CPU; every process calls it."""
        return _whole(self.model, skip=self.layers_path)


def _whole(module: nn.Module, skip: str | None = None) -> Tensors:
    return {name: whole(value).cpu() for name, value in tensors_of(module, skip=skip).items()}
