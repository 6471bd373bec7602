"""Prove that residual channels can be removed, on a small random model.

Three things are proven of a wide model and a narrow one of the same config with fewer channels:

    channels are free     the wide model with its channels in another order everywhere has the same logits
    cutting is masking    where the removed channels are zero in all that writes them, the narrow model with the kept
                          channels has the same logits, its norms being scaled by √(D/K): a norm divides by the root of
                          the mean over all channels
    readers are linear    the inputs of what reads channels, mixed by an invertible matrix, give the same logits when
                          the readers' weights are mixed by its inverse

In the second proof everything that writes has its mean over the channels subtracted, so that it is exact for norms
that subtract the mean too. Where the model scales its embeddings by the hidden size (Gemma), the table is scaled back.

Shapes in names: D hidden size, K channels kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import fill_with_noise, find_layers, text_config
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.proof import RUN_ERRORS, equal_up_to_rounding
from llmprune.anatomy.residual_channels import (
    cut_channels,
    first_tensor,
    has_unit_offset,
    kept_channels,
    mix_inputs,
    readers_of,
    scaled_norm,
)
from llmprune.anatomy.selection import select_along
from llmprune.anatomy.types import HiddenDim, HiddenSize

_TOKENS = 12
_SAME_SCALE = 1e-4
_TOLERANCE = 1e-3  # of the largest logit: norms add a constant to the mean square, which the cut rescales

Tensors = dict[str, Tensor]


@torch.no_grad()
def prove_hidden_size(
    hidden: HiddenSize, wide: PreTrainedModel, *, narrow: PreTrainedModel, kept: int
) -> HiddenSize | str:
    """Return the channels, with the offsets of norms found; or the reason why none can be removed.

    ``hidden``: its tensors, by layer of both models; ``kept``: channels of the narrow one, half of the wide one's.
    """
    fill_with_noise(wide)
    wide.tie_weights()
    path, layers = find_layers(wide)
    try:
        hidden = replace(
            hidden,
            outside=_with_offsets(wide, hidden.outside),
            layers=tuple(_with_offsets(layer, dims) for layer, dims in zip(layers, hidden.layers, strict=True)),
        )
        dims = [
            replace(one, name=f"{path}.{index}.{one.name}") for index, own in enumerate(hidden.layers) for one in own
        ]
        return _prove(wide, narrow, dims=[*dims, *hidden.outside], kept=kept) or hidden
    except RUN_ERRORS as error:
        return f"a small model with {kept} channels does not run ({type(error).__name__}: {error})"


def _with_offsets(module: nn.Module, dims: Sequence[HiddenDim]) -> tuple[HiddenDim, ...]:
    def with_offset(one: HiddenDim) -> HiddenDim:
        norm, last = module.get_submodule(one.module), one.name.rpartition(".")[2]
        return replace(one, has_offset=has_unit_offset(norm, last)) if one.role == "scales" else one

    return tuple(map(with_offset, dims))


def _prove(wide: PreTrainedModel, narrow: PreTrainedModel, *, dims: list[HiddenDim], kept: int) -> str:
    generator = torch.Generator().manual_seed(0)
    order_D = torch.randperm(2 * kept, generator=generator)
    keep_K = order_D[:kept].sort().values
    _spread_norms(wide, dims)
    tensors = _own_tensors(wide)
    expected = _logits(wide, tensors)
    if not equal_up_to_rounding(
        _logits(wide, select_along(tensors, kept_channels(dims, order_D))), expected, tolerance=_TOLERANCE
    ):
        return "its logits depend on the order of the channels"
    reason = _linear_readers(wide, tensors, dims=dims, expected=expected)
    if reason:
        return reason
    return _masked(wide, narrow, tensors=tensors, dims=dims, keep_K=keep_K)


def _spread_norms(model: PreTrainedModel, dims: list[HiddenDim]) -> None:
    """Give embeddings a size near 1, and norms weights near 1: noise about zero would hide most channels."""
    generator = torch.Generator().manual_seed(2)
    for one in dims:
        tensor = tensor_of(model, one.name)
        if one.role == "scales":
            tensor.data = 1 + 0.3 * torch.randn(tensor.shape, generator=generator)
        elif one.role == "writes" and isinstance(model.get_submodule(one.module), nn.Embedding):
            tensor.data = tensor.data * tensor.shape[-1] ** 0.5


def _linear_readers(wide: PreTrainedModel, tensors: Tensors, *, dims: list[HiddenDim], expected: Tensor) -> str:
    size = next(tensors[one.name].shape[one.dim] for one in dims)
    generator = torch.Generator().manual_seed(1)
    mixing_DD = torch.eye(size) + 0.5 * torch.randn(size, size, generator=generator) / size**0.5
    back_DD = torch.linalg.inv(mixing_DD).T
    mixed = dict(tensors)
    readers = readers_of(dims)
    for one in dims:
        if one.role == "reads":
            mixed[one.name] = mix_inputs(tensors[one.name], one.dim, mixing_DK=back_DD)
    with _mixed_inputs(wide, list(readers), mixing_DD=mixing_DD):
        logits = _logits(wide, mixed)
    if not equal_up_to_rounding(logits, expected, tolerance=_TOLERANCE):
        return "not all that reads its channels does so linearly"
    return "" if wide.get_output_embeddings() is not None else "it has no output embeddings"


@contextmanager
def _mixed_inputs(model: nn.Module, paths: list[str], *, mixing_DD: Tensor) -> Iterator[None]:
    def mix(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value = first_tensor(args, kwargs)
        mixed = (value @ mixing_DD).to(value.dtype)
        if args:
            return (mixed, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): mixed}

    with ExitStack() as hooks:
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(mix, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _masked(
    wide: PreTrainedModel, narrow: PreTrainedModel, *, tensors: Tensors, dims: list[HiddenDim], keep_K: Tensor
) -> str:
    masked = dict(tensors)
    for one in dims:
        if one.role in ("writes", "shifts"):
            masked[one.name] = _centred(tensors[one.name], one, keep_K=keep_K)
    expected = _logits(wide, masked)
    entering_D = entering(wide)
    cut = cut_channels(masked, dims, keep_K=keep_K, size=entering_D.shape[-1])
    _load(narrow, cut)
    cut |= rescaled_embeddings(narrow, dims, scale=scale_between(entering(narrow), entering_D[..., keep_K]))
    if not equal_up_to_rounding(_logits(narrow, cut), expected, tolerance=_TOLERANCE):
        return "a model without some channels is not the model in which they are zero"
    return ""


def _centred(tensor: Tensor, one: HiddenDim, *, keep_K: Tensor) -> Tensor:
    """Return a tensor that writes nothing to the removed channels, and a mean of zero to the others."""
    if one.role == "shifts":
        return torch.zeros_like(tensor)
    kept = tensor.index_select(one.dim, keep_K)
    return torch.zeros_like(tensor).index_copy_(one.dim, keep_K, kept - kept.mean(one.dim, keepdim=True))


def scale_between(narrow_BLK: Tensor, wide_BLK: Tensor) -> float:
    """Return the factor by which narrow values are to be multiplied to be the wide ones; 1 where that is near."""
    narrow_BLK, wide_BLK = narrow_BLK.float(), wide_BLK.float()
    scale = float((narrow_BLK * wide_BLK).sum() / narrow_BLK.square().sum().clamp_min(1e-30))
    return 1.0 if abs(scale - 1) < _SAME_SCALE else scale


def rescaled_embeddings(model: PreTrainedModel, outside: Sequence[HiddenDim], *, scale: float) -> Tensors:
    """Return the embedding table of a model times ``scale``, where a class scales it by the hidden size.

    With a tied head, also the weight of the last norm divided by it.
    """
    if scale == 1:
        return {}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is table)
    scaled = {name: table.weight.data * scale}
    if head is not None and head.weight is table.weight:
        last = [one for one in outside if one.role == "scales"][-1]
        scaled[last.name] = scaled_norm(tensor_of(model, last.name).data, last, factor=1 / scale)
    return scaled


def _own_tensors(model: PreTrainedModel) -> Tensors:
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def _load(model: PreTrainedModel, tensors: Tensors) -> None:
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()


def _logits(model: PreTrainedModel, tensors: Tensors) -> Tensor:
    """Return the logits of a model with these tensors on random tokens."""
    _load(model, tensors)
    logits: Tensor = model(input_ids=_tokens(model), use_cache=False).logits
    return logits


def _tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = text_config(model.config).vocab_size
    return torch.randint(0, vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(3))


class _EnteredError(Exception):
    """The first layer is about to run."""


def entering(model: PreTrainedModel) -> Tensor:
    """Return the hidden states [B, L, D] of random tokens before the first layer, whose weights are not needed."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(first_tensor(args, kwargs))
        raise _EnteredError

    _, layers = find_layers(model)
    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_EnteredError), torch.no_grad():
            model(input_ids=_tokens(model).to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        handle.remove()
    return seen[0]
