"""Estimate the memory of a batch's activations in one layer, from the shapes of its modules.

With B windows of L tokens, s bytes a value, D the hidden size, F the MLP neurons that a token activates (of experts
only those that it is routed to), Q the outputs of all other projections of the layer (queries, keys, values, token
mixers), H the attention heads and V the vocabulary:

    a run of the layer:     R = s · (10 D + max(3 F, 2 Q)), and H · L · (2 s + 4) where attention scores are stored
    pass 1:                 R + 4 F; with gradients, for which the layer's values are kept, 2 R + 8 F
    pass 2:                 R + 4 · (3 F + 4 D); where layers are trained at least 2 R + 8 F
    logits:                 8 copies in float32, of at most ``layerwise.logits.MAX_LOGITS`` values each

These are bytes a token; a batch takes B · L times as much. The factors are measured on tiny models of several families
and rounded up: under no_grad the values of a layer are freed while it runs, and the widest point is in its MLP or in
its attention. 4: statistics are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.projections import projections_of
from llmprune.anatomy.types import Anatomy, MlpUnit
from llmprune.layerwise.logits import MAX_LOGITS

_LOGIT_COPIES = 8  # of dense and pruned model: logits, in float32, log-probabilities, their products
_RESIDUALS, _MLP_VALUES, _MIXER_VALUES = 10, 3, 2  # D, F and Q in a run of a layer
_FLOAT32 = 4


@dataclass(frozen=True)
class TokenActivations:
    """Bytes of a token's activations: in pass 1, in pass 2, in a plain run of a layer (held-out text), in the head.

    ``logits``: of all copies, in float32. Those of attention scores are for windows of the length that they were
    estimated for.
    """

    pass1: int
    pass2: int
    run: int
    logits: int

    def calibration(self, tokens: int) -> int:
        """Return the bytes of a batch of so many tokens in the passes over the calibration windows."""
        return max(self.pass1, self.pass2) * tokens

    def held_out(self, tokens: int) -> int:
        """Return the bytes of a batch of so many tokens of held-out text: of a layer, or of the head."""
        return max(self.run * tokens, min(self.logits * tokens, _LOGIT_COPIES * _FLOAT32 * MAX_LOGITS))


def token_activations(
    dense: PreTrainedModel, anatomy: Anatomy, *, length: int, gradients: bool, refits: bool, trains: bool
) -> TokenActivations:
    """Return the activations of a token in windows of ``length`` tokens, from a model without weights.

    ``gradients``: pass 1 has a backward pass. ``refits``: pass 2 computes statistics. ``trains``: it trains layers,
    on a window at a time.
    """
    text, itemsize = text_config(dense.config), dense.dtype.itemsize
    hidden, layers = text.hidden_size, find_layers(dense)[1]
    top_k = anatomy.experts.top_k if anatomy.experts else None
    neurons = max(_active_neurons(units, top_k) for units in anatomy.units)
    mixers = max(_other_outputs(layer, units) for layer, units in zip(layers, anatomy.units, strict=True))
    run = itemsize * (_RESIDUALS * hidden + max(_MLP_VALUES * neurons, _MIXER_VALUES * mixers))
    if getattr(text, "_attn_implementation", None) == "eager":
        run += (getattr(text, "num_attention_heads", None) or 0) * length * (2 * itemsize + _FLOAT32)
    statistics = _FLOAT32 * neurons
    refit = run + (3 * statistics + 4 * _FLOAT32 * hidden if refits else 0)
    return TokenActivations(
        pass1=2 * (run + statistics) if gradients else run + statistics,
        pass2=max(refit, 2 * (run + statistics)) if trains else refit,
        run=run,
        logits=_LOGIT_COPIES * _FLOAT32 * text.vocab_size,
    )


def _active_neurons(units: Sequence[MlpUnit], top_k: int | None) -> int:
    """Return the neurons of a layer that one token activates; all experts' where the number routed to is unknown."""
    return sum(unit.width * (1 if unit.experts is None else min(top_k or unit.experts, unit.experts)) for unit in units)


def _other_outputs(layer: nn.Module, units: Sequence[MlpUnit]) -> int:
    """Return the outputs of a layer's projections that belong to no prunable MLP."""
    of_units = {tensor.name.rpartition(".")[0] for unit in units for tensor in unit.tensors}
    return sum(one.outputs for one in projections_of(layer) if one.name not in of_units)
