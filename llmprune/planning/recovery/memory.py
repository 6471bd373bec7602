"""Memory of the training after the cut, by method.

With P parameters of the pruned model, T of them trained, A of the adapters, L tokens of the windows at a time, D the
hidden size, V the vocabulary and values in float32, a training holds

    full:           4 P for the weights and 12 T for gradients and the two moments of Adam; T leaves out embeddings and
                    head, unless they are asked for; on a GPU 2 P more, as autocast keeps a bfloat16 copy of the weights
    lora:           the weights in the model's type, and 16 A
    activations:    with gradient checkpointing the hidden states of L tokens after each layer, and what one layer keeps
                    for its gradients or 3 copies of the logits [L, V], whichever is larger; without it what all layers
                    keep, and the logits
    hidden_states:  the dense model beside the pruned one
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.projections import projections_of
from llmprune.planning.duration.parts import PlannedModels
from llmprune.planning.memory.passes import parameter_bytes
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recover import Recover
from llmprune.results.figures.base import Figures

_OPTIMISER = 12  # bytes of the gradient and the moments of a trained parameter
FLOAT32 = 4
_BFLOAT16 = 2
_AUTOCAST = 2.6  # bytes of a value that is kept for the gradients under autocast: norms are in float32
# Values that a layer keeps for its gradients, and those that its backward pass adds, by the values that
# ``LayerCost.stream`` counts; measured on Llama and Qwen 3 with torch.autograd.graph.saved_tensors_hooks.
_KEPT, _ADDED = 0.45, 0.17
_LOGIT_COPIES = 3  # logits, their logarithms of probabilities, gradients


class RecoveryMemory(Figures):
    """Bytes of a training, on the device that trains."""

    weights: int  # of the model, the adapters, and the dense model where it is beside them
    optimiser: int  # gradients and moments
    activations: int
    windows: int  # whose activations are held together

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return self.weights + self.optimiser + self.activations


@dataclass(frozen=True)
class TrainingSetting:
    """A way to train: what changes its memory. ``windows``: at a time."""

    method: str
    length: int
    on_gpu: bool
    checkpointing: bool
    windows: int = 1


def length_of(text: TokenWindows) -> int:
    """Return the tokens of a window of resolved text."""
    assert text.sequence_length is not None, "resolved windows have a length"
    return text.sequence_length


def memory_of_training(recover: Recover, models: PlannedModels, *, setting: TrainingSetting) -> RecoveryMemory:
    """Return the bytes that a training takes on its device."""
    trained = trained_parameters(recover, models.pruned, method=setting.method)
    parameters = sum(parameter.numel() for parameter in models.pruned.parameters())
    lora = setting.method == "lora"
    weights = parameter_bytes(models.pruned) + FLOAT32 * trained if lora else FLOAT32 * parameters
    copied = 0 if lora or not setting.on_gpu else _BFLOAT16 * parameters
    dense = parameter_bytes(models.dense) if recover.hidden_states else 0
    activations = setting.windows * _activations(models, setting=setting)
    return RecoveryMemory(
        weights=weights + copied + dense,
        optimiser=_OPTIMISER * trained,
        activations=activations,
        windows=setting.windows,
    )


def _activations(models: PlannedModels, *, setting: TrainingSetting) -> int:
    """Return the bytes of the activations of one window."""
    config, length = text_config(models.pruned.config), setting.length
    heads = getattr(config, "num_attention_heads", None) or 0
    scores = 3 * heads * length if getattr(config, "_attn_implementation", None) == "eager" else 0
    layers = [cost.stream / models.itemsize for cost in models.pruned_costs(length)]
    value = _AUTOCAST if setting.on_gpu else FLOAT32
    kept = [value * length * (_KEPT * values + scores) for values in layers]
    added = value * length * _ADDED * max(layers)
    logits = _LOGIT_COPIES * FLOAT32 * length * int(config.vocab_size)
    if setting.checkpointing:
        states = len(layers) * length * models.hidden * FLOAT32
        return int(states + max(max(kept) + added, logits))
    return int(sum(kept) + max(added, logits))


def trained_parameters(recover: Recover, pruned: PreTrainedModel, *, method: str) -> int:
    """Return the parameters that are trained: of the adapters of all projections in the layers, or of the model."""
    path, layers = find_layers(pruned)
    if method == "lora":
        projections = [one for layer in layers for one in projections_of(layer)]
        return sum(recover.lora.rank * (one.inputs + one.outputs) for one in projections)
    return sum(
        parameter.numel()
        for name, parameter in pruned.named_parameters()
        if recover.embeddings or parameter.ndim < 2 or name.startswith(f"{path}.")
    )
