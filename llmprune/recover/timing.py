"""How many windows can be trained on in a given time, from the time of a few steps.

Shapes: N windows, L sequence length.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.common.distributed import sum_over_processes, world_size
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recover import Recover
from llmprune.recover.arithmetic import Arithmetic
from llmprune.recover.lessons import Lessons
from llmprune.recover.student import Student

_TIMED = 3  # windows, after one that is not


def windows_in(
    hours: float,
    repaired: ModelSource,
    *,
    settings: Recover,
    arithmetic: Arithmetic,
    sample_NL: Tensor,
    dense_pass: float,
) -> int:
    """Return the number of windows of ``sample_NL``'s length that all processes together can train on in so many hours.

    The dense model's predictions are counted in. Nothing is trained. ``dense_pass``: operations of its forward pass,
    relative to the repaired model's.
    """
    student = Student(open_decoder(repaired), settings, arithmetic=arithmetic)
    lessons = Lessons(sample_NL[: _TIMED + 1], torch.arange(min(_TIMED + 1, len(sample_NL)))[None], None)
    begin = 0.0
    for row in lessons.order_SW[0].tolist():
        if row <= 1:
            begin = time.perf_counter()
        rows_B = torch.tensor([row])
        lessons.mean_loss(student.logits(lessons.windows_NL[rows_B]), rows_B).backward()  # type: ignore[no-untyped-call]
        student.clip_gradients(1.0)
    each = (time.perf_counter() - begin) / max(len(lessons.windows_NL) - 1, 1)
    seconds = torch.tensor([each], dtype=torch.float64)
    sum_over_processes([seconds])
    of_dense = _dense_share(settings, dense_pass, checkpointing=arithmetic.save_memory)
    return max(int(hours * 3600 * world_size() ** 2 / (float(seconds) * (1 + of_dense))), 1)


def _dense_share(settings: Recover, dense_pass: float, *, checkpointing: bool) -> float:
    """Return the time of the dense model's forward passes for a window, relative to that of a training step.

    A step is worth a forward pass, the gradients of activations, those of the weights unless adapters are trained, and
    with checkpointing another forward pass.
    """
    passes = (settings.loss == "distillation") + (settings.hidden_states > 0)
    return dense_pass * passes / (2 + (settings.method != "lora") + checkpointing)
