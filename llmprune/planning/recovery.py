"""Plan the training after the cut: windows and steps, memory by method, disk.

With P parameters of the pruned model, A of the adapters, L tokens of the windows at a time, D the hidden size, V the
vocabulary and values in float32, a training holds

    full:           16 P: weights, gradients, and the two moments of Adam; on a GPU 2 P more, for autocast keeps a
                    bfloat16 copy of the weights
    lora:           the weights in the model's type, and 16 A
    activations:    with gradient checkpointing the hidden states of L tokens after each layer, and what one layer keeps
                    for its gradients or 3 copies of the logits [L, V], whichever is larger; without it what all layers
                    keep, and the logits
    hidden_states:  the dense model beside the pruned one

The dense model's predictions are on disk: of each token ``top_k`` logits of 2 bytes with ids of 4 bytes, and 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.projections import projections_of
from llmprune.common.schema import format_size
from llmprune.data.sources import local_bytes
from llmprune.data.window_sources import distinct_names, shares
from llmprune.planning.duration.parts import PlannedModels
from llmprune.planning.memory.machine import Device, Machine
from llmprune.planning.memory.passes import parameter_bytes
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.recover import Recover
from llmprune.results.figures.base import Figures

_TRAINED, _STATE = 16, 12  # bytes of a trained parameter: in memory; weights and moments in a file, to go on from
_FLOAT32, _BFLOAT16 = 4, 2
_AUTOCAST = 2.6  # bytes of a value that is kept for the gradients under autocast: norms are in float32
# Values that a layer keeps for its gradients, and those that its backward pass adds, by the values that
# ``LayerCost.stream`` counts; measured on Llama and Qwen 3 with torch.autograd.graph.saved_tensors_hooks.
_KEPT, _ADDED = 0.45, 0.17
_LOGIT_COPIES = 3  # logits, their logarithms of probabilities, gradients


class RecoverySource(Figures):
    """Source of the training's text, with the windows that it is asked for."""

    name: str
    windows: int


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


class RecoveryPlan(Figures):
    """The training after the cut. ``steps`` and ``tokens`` are None where the recipe gives ``hours``."""

    method: str
    loss: str
    steps: int | None
    tokens: int | None  # of whole steps
    hours: float | None
    windows_of_step: int | None
    sequence_length: int
    learning_rate: float
    sources: tuple[RecoverySource, ...]  # of text; for ``hours`` without windows
    generated: int  # windows that the dense model writes itself, those that are held out included
    held_out: int  # windows of each source
    checkpointing: bool
    trained: int  # parameters
    memory: RecoveryMemory
    disk: int  # bytes of the dense model's predictions, the training's state, and the repaired checkpoint
    bytes_of_token: int  # of the dense model's predictions


@dataclass(frozen=True)
class _Setting:
    """A way to train: what changes its memory. ``windows``: at a time."""

    method: str
    length: int
    on_gpu: bool
    checkpointing: bool
    windows: int = 1


def plan_recovery(recipe: Recipe, models: PlannedModels, *, machine: Machine) -> RecoveryPlan | None:
    """Return the plan of the recipe's ``recover``; None without the section."""
    recover = recipe.recover
    if recover is None:
        return None
    text = recover.data.resolved(recipe.calibration)
    length = length_of(text)
    number = recover.windows(recover.tokens, length) if recover.tokens else None
    steps = recover.steps(recover.tokens, length) if recover.tokens else None
    trained = _adapters(recover, models.pruned) if recover.method == "lora" else _parameters(models.pruned)
    token = 6 * recover.top_k + 4
    generated = recover.generated(length)
    predicted = _predicted_windows(recover, text, number=number, generated=generated)
    of_step = recover.windows_of_step(recover.tokens, length) if recover.tokens else None
    setting = _setting_on(recover, models, machine=machine, length=length)
    return RecoveryPlan(
        method=recover.method,
        loss=recover.loss,
        steps=steps,
        tokens=number * length if number else None,
        hours=recover.hours,
        windows_of_step=of_step,
        sequence_length=length,
        learning_rate=recover.rate(models.hidden),
        sources=_sources(recover, text, number=number),
        generated=generated,
        held_out=recover.held_out,
        checkpointing=setting.checkpointing,
        trained=trained,
        memory=_memory(recover, models, setting=setting),
        disk=predicted * length * token + (2 * _STATE + _FLOAT32) * trained + models.pruned_bytes,
        bytes_of_token=token,
    )


def recovery_shortage(recipe: Recipe, models: PlannedModels, *, machine: Machine) -> str | None:
    """Return why the training does not fit the device that computes, and what would; None where it fits."""
    recover = recipe.recover
    if recover is None:
        return None
    device, length = machine.devices[0], length_of(recover.data.resolved(recipe.calibration))
    setting = replace(_setting_on(recover, models, machine=machine, length=length), windows=1)
    needed = _memory(recover, models, setting=setting)
    if needed.total <= device.total:
        return None
    remedies = [*_fitting(recover, models, setting=setting, machine=machine), "use a machine with more memory"]
    return (
        f"recover: {device.name} has {format_size(device.total)}, and method: {recover.method} needs "
        f"{format_size(needed.total)}: weights {format_size(needed.weights)}, gradients and optimiser "
        f"{format_size(needed.optimiser)}, activations of one window {format_size(needed.activations)}; "
        f"{', or '.join(remedies)}"
    )


def _setting_on(recover: Recover, models: PlannedModels, *, machine: Machine, length: int) -> _Setting:
    """Return the way in which a run trains on this machine."""
    on_gpu, asked = machine.has_gpu, recover.checkpointing
    at_once = recover.windows_at_once(length, on_gpu=on_gpu)
    windows = min(at_once, recover.windows_of_step(recover.tokens, length)) if recover.tokens else at_once
    setting = _Setting(recover.method, length, on_gpu, on_gpu if asked == "auto" else asked, windows)
    if asked == "auto" and _memory(recover, models, setting=setting).total > machine.devices[0].total:
        return replace(setting, checkpointing=True)
    return setting


def length_of(text: TokenWindows) -> int:
    """Return the tokens of a window of resolved text."""
    assert text.sequence_length is not None, "resolved windows have a length"
    return text.sequence_length


def _fitting(recover: Recover, models: PlannedModels, *, setting: _Setting, machine: Machine) -> list[str]:
    """Return the changes with which the training would fit, each with the memory that it then needs."""
    device, found = machine.devices[0], []

    def fits(one: _Setting, on: Device, *, remedy: str) -> bool:
        needed = _memory(recover, models, setting=one).total
        if needed <= on.total:
            found.append(f"{remedy} ({format_size(needed)})")
        return needed <= on.total

    if not setting.checkpointing:
        fits(replace(setting, checkpointing=True), device, remedy="set recover.checkpointing: true")
    methods = ("full", "lora") if setting.method == "full" else ("lora",)
    if setting.method == "full":
        fits(replace(setting, method="lora"), device, remedy="set recover.method: lora")
    lengths = [length for power in range(1, 6) if (length := setting.length >> power) >= 128]
    for method in methods:
        also = " with recover.method: lora" if method != setting.method else ""
        shorter = "set recover.data.sequence_length: {}" + also
        settings = {one: replace(setting, method=method, length=one) for one in lengths}
        if any(fits(one, device, remedy=shorter.format(length)) for length, one in settings.items()):
            break
    if setting.on_gpu:
        fits(
            replace(setting, on_gpu=False),
            machine.host,
            remedy="hide the GPU with CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    return found


def _memory(recover: Recover, models: PlannedModels, *, setting: _Setting) -> RecoveryMemory:
    parameters = _parameters(models.pruned)
    if setting.method == "lora":
        adapters = _adapters(recover, models.pruned)
        weights, optimiser = parameter_bytes(models.pruned) + _FLOAT32 * adapters, (_TRAINED - _FLOAT32) * adapters
    else:
        weights, optimiser = _FLOAT32 * parameters, (_TRAINED - _FLOAT32) * parameters
    copied = _BFLOAT16 * parameters if setting.on_gpu and setting.method == "full" else 0
    dense = parameter_bytes(models.dense) if recover.hidden_states else 0
    activations = setting.windows * _activations(models, setting=setting)
    return RecoveryMemory(
        weights=weights + copied + dense, optimiser=optimiser, activations=activations, windows=setting.windows
    )


def _activations(models: PlannedModels, *, setting: _Setting) -> int:
    """Return the bytes of the activations of one window."""
    config, length = text_config(models.pruned.config), setting.length
    heads = getattr(config, "num_attention_heads", None) or 0
    scores = 3 * heads * length if getattr(config, "_attn_implementation", None) == "eager" else 0
    layers = [cost.stream / models.itemsize for cost in models.pruned_costs(length)]
    value = _AUTOCAST if setting.on_gpu else _FLOAT32
    kept = [value * length * (_KEPT * values + scores) for values in layers]
    added = value * length * _ADDED * max(layers)
    logits = _LOGIT_COPIES * _FLOAT32 * length * int(config.vocab_size)
    if setting.checkpointing:
        states = len(layers) * length * models.hidden * _FLOAT32
        return int(states + max(max(kept) + added, logits))
    return int(sum(kept) + max(added, logits))


def _adapters(recover: Recover, pruned: PreTrainedModel) -> int:
    """Return the parameters of the adapters of all projections in the layers."""
    projections = [one for layer in find_layers(pruned)[1] for one in projections_of(layer)]
    return sum(recover.lora.rank * (one.inputs + one.outputs) for one in projections)


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sources(recover: Recover, text: TokenWindows, *, number: int | None) -> tuple[RecoverySource, ...]:
    """Return the sources of text with their windows; without windows where their number is not known."""
    sources = text.text_sources()
    names = distinct_names(sources) or [str(text.tokens)]
    of_text = recover.windows_of_text(number, length_of(text)) if number else 0
    counts = shares(of_text, [source.weight for source in sources]) if sources else [of_text]
    return tuple(RecoverySource(name=name, windows=count) for name, count in zip(names, counts, strict=True))


def _predicted_windows(recover: Recover, text: TokenWindows, *, number: int | None, generated: int) -> int:
    """Return the most windows whose predictions are stored: each once, of the loss's text and of the held-out text."""
    sources, length = text.text_sources(), length_of(text)
    held_out = recover.held_out * max(len(sources), 1)
    if recover.loss == "language_model" or number is None:
        return held_out
    of_text, sizes = recover.windows_of_text(number, length), [local_bytes(source) for source in sources]
    if text.tokens:
        of_text = min(of_text, (text.stored_shape() or (of_text, 0))[0])
    elif None not in sizes:
        of_text = min(of_text, sum(size or 0 for size in sizes) // length)  # a token has at least one byte
    return of_text + generated + held_out
