"""Operations and bytes of layers, regressions and sums, counted on a model without weights.

An operation is one addition or one multiplication, so that a matrix with P entries takes 2 P for each token.

Shapes in names: D hidden size, F inputs of a projection, O outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.types import Anatomy
from llmprune.common.linalg.fold_sums import SKETCHED
from llmprune.common.linalg.gram import gram_operations
from llmprune.recipe.refit import Refit

_TRIED = 4  # ridge strengths that cross-validation tries, about
_OPERATIONS_OF_MODULE = 5  # operations that a module without parts starts: a norm 6, a projection 1, attention 10
_SCORES = 4  # operations of attention for each pair of tokens and each dimension: QKᵀ and the sum of the values


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a part of a run, those of all processes together."""

    products: float = 0.0  # operations of matrix products in the type that the layers compute in
    plain_products: float = 0.0  # the same, computed by transformers' own model
    sums: float = 0.0  # float32 operations that the processes divide: sums over tokens
    solves: float = 0.0  # float32 operations that every process makes, on matrices of the size of a layer's
    stream: float = 0.0  # bytes of activations that are read and written
    narrow: float = 0.0  # bytes of weights that products with a few tokens read, besides their operations
    weights: float = 0.0  # bytes of weights that every process brings to its device
    files: float = 0.0  # bytes written to files
    calls: float = 0.0  # operations started
    starts: float = 0.0  # fresh processes that load the libraries
    seconds: float = 0.0  # that are given, whatever the device

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(*(mine + theirs for mine, theirs in zip(self.amounts, other.amounts, strict=True)))

    def __mul__(self, factor: float) -> Work:
        """Return as many of them, with fractions."""
        return Work(*(amount * factor for amount in self.amounts))

    @property
    def amounts(self) -> tuple[float, ...]:
        """All amounts, in their order."""
        return tuple(vars(self).values())

    @staticmethod
    def total(parts: Iterable[Work]) -> Work:
        """Return all parts together."""
        return sum(parts, Work())


@dataclass(frozen=True)
class LayerCost:
    """Cost of a forward pass of one layer.

    ``mixer``, ``mlp``: operations for each token, of the token mixer (with norms and router) and of the MLPs.
    ``scores``: operations of attention for each pair of tokens, which ``at`` adds to the mixer's. ``stream``: bytes of
    activations for each token. ``bytes``: of its weights. ``calls``: operations started for each batch.
    """

    mixer: float
    mlp: float
    scores: float
    stream: float
    bytes: int
    calls: int

    def at(self, length: int) -> LayerCost:
        """Return the cost in windows of ``length`` tokens."""
        return replace(self, mixer=self.mixer + self.scores * length, scores=0.0)

    def run(self, tokens: float, batches: float, *, mixer: bool = True, mlp: bool = True) -> Work:
        """Return the work of a pass over so many tokens; ``mixer``, ``mlp``: whether these parts run."""
        per_token = self.mixer * mixer + self.mlp * mlp
        share = per_token / max(self.mixer + self.mlp, 1.0)
        return Work(
            products=tokens * per_token, stream=tokens * self.stream * share, calls=batches * self.calls * share
        )


def costs_of(model: PreTrainedModel, anatomy: Anatomy, *, layers: Iterable[int]) -> tuple[LayerCost, ...]:
    """Return the cost of each layer of a model without weights.

    ``layers``: indices of its layers in the dense model, which ``anatomy`` describes.
    """
    _, modules = find_layers(model)
    config = text_config(model.config)
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return tuple(
        _cost_of(module, anatomy, index=index, scores=heads * size * _SCORES, hidden=config.hidden_size)
        for index, module in zip(layers, modules, strict=True)
    )


def _cost_of(module: nn.Module, anatomy: Anatomy, *, index: int, scores: int, hidden: int) -> LayerCost:
    """Return the cost of one layer. ``scores``: operations of attention for each pair of tokens."""
    block, experts = anatomy.blocks[index], anatomy.experts
    stacked = {tensor.name for tensor in block.tensors} if block else set()
    share = (experts.top_k or experts.count) / experts.count if experts else 1.0
    in_mlp = {tensor.name for unit in anatomy.units[index] for tensor in unit.tensors} | stacked
    mixer, mlp, stream, size = 0.0, 0.0, 0.0, 0
    for name, parameter in module.named_parameters():
        size += parameter.numel() * parameter.itemsize
        if parameter.ndim < 2:
            continue
        is_routed = name in stacked and parameter.ndim == 3
        operations = 2 * parameter.numel() * (share if is_routed else 1)
        rows = sum(parameter.shape[-2:]) * (share * parameter.shape[0] if is_routed else 1)
        stream += 2 * rows * parameter.itemsize  # written by one module, read by the next
        if name in in_mlp:
            mlp += operations
        else:
            mixer += operations
    parameter = next(module.parameters())
    leaves = sum(1 for part in module.modules() if not any(part.children()))
    stream += 8 * hidden * parameter.itemsize
    return LayerCost(mixer, mlp, scores, stream, size, leaves * _OPERATIONS_OF_MODULE)


def head_operations(model: PreTrainedModel) -> float:
    """Return the operations of the language-model head for each token, 2 D V."""
    config = text_config(model.config)
    return 2.0 * int(config.hidden_size) * int(config.vocab_size)


def refit_work(inputs: int, outputs: int, *, tokens: float, refit: Refit, folds: int, parts: int = 1) -> Work:
    """Return the sums and solutions of the refit of one projection (``common.linalg.cross_validated_ridge``).

    ``parts``: number of parts that the regression target has.
    """
    sketched = min(outputs, SKETCHED)
    for_token = gram_operations(inputs) + 2 * parts * (inputs * outputs + inputs * sketched + outputs * sketched)
    final = inputs**3 / 3 + 2 * inputs**2 * outputs
    one_try = inputs**3 / 3 + 4 * parts * inputs**2 * sketched
    tried = 0 if folds < 2 else (1 if refit.ridge is not None else _TRIED) * (1 if folds == 2 else folds)
    return Work(
        sums=tokens * for_token,
        solves=final + tried * one_try,
        stream=tokens * 4 * (2 * inputs + (2 + parts) * outputs),  # to float32, and the target's parts
        calls=8 * folds,
    )


def cut_refit_work(inputs: int, outputs: int, *, removed: int, tokens: float, refit: Refit, folds: int) -> Work:
    """Return the same of a projection that lost ``removed`` inputs which are known (``common.linalg.cut_equations``).

    The products of kept with removed inputs replace the second part of the target.
    """
    sketched = min(outputs, SKETCHED)
    second = inputs * outputs + outputs * sketched
    products = inputs * removed + removed * sketched
    both = refit_work(inputs, outputs, tokens=tokens, refit=refit, folds=folds, parts=2)
    return both + Work(sums=2 * tokens * (products - second))


def up_refit_work(inputs: int, neurons: int, *, outputs: int, tokens: float) -> Work:
    """Return the sums of the refit of an up projection: 8 steps of conjugate gradients, as most layers take."""
    steps = 8
    for_step = 4 * neurons * (inputs + outputs)  # a step's output and the next gradient
    metric = 6 * neurons * inputs**2
    return Work(
        sums=tokens * (gram_operations(inputs) + steps * for_step),
        solves=inputs**3 / 3 + steps * metric,
        stream=tokens * steps * 4 * (4 * neurons + 2 * inputs + 6 * outputs),
    )
