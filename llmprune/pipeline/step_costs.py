"""What a step cost: time, tokens, bytes read, peak memory.

Peaks come from Linux's own accounting, reset when a step begins; elsewhere they are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.common.distributed import windows_of_process
from llmprune.common.process_memory import peak_resident, proc_field, reset_peak
from llmprune.common.progress import report_progress
from llmprune.evaluation.bench.generation_speed import input_device
from llmprune.results.schema import Step

FORWARD = "plain forward pass"


@contextmanager
def account(steps: list[Step], name: str, *, tokens: int | None = None) -> Iterator[None]:
    """Append a Step for what happens in this context. ``tokens``: how many went through the model."""
    report_progress(name)
    reset_peak()
    read, start = proc_field("io", "read_bytes:"), time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    after = proc_field("io", "read_bytes:")
    steps.append(
        Step(
            name=name,
            seconds=round(seconds, 3),
            reused=False,
            tokens_per_second=round(tokens / seconds, 1) if tokens else None,
            bytes_read=after - read if read is not None and after is not None else None,
            peak_resident=peak_resident(),
            peak_device=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        )
    )


@torch.no_grad()
def plain_forward(model: PreTrainedModel, windows_NL: Tensor, *, batch_size: int) -> None:
    """The decoder's own forward over this process's windows, without the head: what a pass is compared with."""
    device = input_device(model)
    for ids_BL in torch.split(windows_of_process(windows_NL), batch_size):
        model.base_model(input_ids=ids_BL.to(device), use_cache=False)


def compare_with_forward(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, those that walk calibration tokens with their ratio to the mean forward pass, if it was measured."""
    measured = [step.seconds for step in steps if step.name == FORWARD]
    forward = sum(measured) / len(measured) if measured else None
    return tuple(
        step.model_copy(update={"forward_ratio": round(step.seconds / forward, 3)})
        if forward and step.tokens_per_second
        else step
        for step in steps
    )
