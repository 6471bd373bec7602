"""Plan the training after the cut: windows and steps, memory, disk.

The dense model's predictions are on disk: of each token ``top_k`` logits of 2 bytes with ids of 4 bytes, and 4 bytes.
"""

from __future__ import annotations

from llmprune.data.sources import local_bytes
from llmprune.data.window_sources import distinct_names, shares
from llmprune.planning.duration.parts import PlannedModels
from llmprune.planning.memory.machine import Machine
from llmprune.planning.recovery.device_fit import setting_on
from llmprune.planning.recovery.memory import (
    FLOAT32,
    RecoveryMemory,
    length_of,
    memory_of_training,
    trained_parameters,
)
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.recover import Recover
from llmprune.results.figures.base import Figures

_STATE = 12  # bytes of a trained parameter in a file to go on from: weights and moments


class RecoverySource(Figures):
    """Source of the training's text, with the windows that it is asked for."""

    name: str
    windows: int


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
    dense_pass: float  # operations of a forward pass of the dense model, relative to the pruned model's


def plan_recovery(recipe: Recipe, models: PlannedModels, *, machine: Machine) -> RecoveryPlan | None:
    """Return the plan of the recipe's ``recover``; None without the section."""
    recover = recipe.recover
    if recover is None:
        return None
    text = recover.data.resolved(recipe.calibration)
    length = length_of(text)
    number = recover.windows(recover.tokens, length) if recover.tokens else None
    steps = recover.steps(recover.tokens, length) if recover.tokens else None
    trained = trained_parameters(recover, models.pruned, method=recover.method)
    token = 6 * recover.top_k + 4
    generated = recover.generated(length)
    predicted = _predicted_windows(recover, text, number=number, generated=generated)
    of_step = recover.windows_of_step(recover.tokens, length) if recover.tokens else None
    setting = setting_on(recover, models, machine=machine, length=length)
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
        memory=memory_of_training(recover, models, setting=setting),
        disk=predicted * length * token + (2 * _STATE + FLOAT32) * trained + models.pruned_bytes,
        bytes_of_token=token,
        dense_pass=models.reference_pass(length),
    )


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
