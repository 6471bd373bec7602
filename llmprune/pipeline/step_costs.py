"""Costs of a step: time, tokens, bytes read, peak memory.

Peaks of resident memory come from Linux, which resets them when a step begins; other systems report none.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from llmprune.common.devices import input_device
from llmprune.common.distributed import windows_of_process, world_size
from llmprune.common.out_of_memory import free_cached_memory
from llmprune.common.process_memory import peak_of_gpus, peak_resident, proc_field, reset_peak, trim
from llmprune.common.progress import estimated_seconds, report_progress
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.disk_waits import REMEDY, is_long
from llmprune.pipeline.context import RunContext
from llmprune.results.figures.provenance import Step

FORWARD_PASS = "plain forward pass"


@contextmanager
def measure_step(
    steps: list[Step], name: str, *, tokens: int | None = None, decoder: Decoder | None = None
) -> Iterator[None]:
    """Measure a block and append its Step to ``steps``; then return the memory that it freed to the system.

    ``tokens``: number of tokens that pass through the model. ``decoder``: reads layers from the disk. In a profile of
    torch.profiler the block has this name.
    """
    report_progress(name, tokens=tokens)
    reset_peak()
    waited = decoder.waits.seconds if decoder else 0.0
    read, start = proc_field("io", "read_bytes:"), time.perf_counter()
    with record_function(name), decoder.waits.watch(name) if decoder else nullcontext():
        yield
    seconds = time.perf_counter() - start
    after = proc_field("io", "read_bytes:")
    steps.append(
        Step(
            name=name,
            seconds=round(seconds, 3),
            estimated_seconds=estimated_seconds(name),
            reused=False,
            tokens_per_second=round(tokens / seconds, 1) if tokens else None,
            seconds_waited=round(decoder.waits.seconds - waited, 3) if decoder else None,
            bytes_read=after - read if read is not None and after is not None else None,
            peak_resident=peak_resident(),
            peak_device=peak_of_gpus(),
        )
    )
    trim()


def warn_of_slow_disk(steps: Sequence[Step]) -> list[str]:
    """Return a warning for each step that waited for layers for a large share of its time."""
    return [
        f"{step.name} waited {step.seconds_waited:.0f} s of {step.seconds:.0f} s for layers to be read: the disk is "
        f"slower than the computation; {REMEDY}"
        for step in steps
        if is_long(step.seconds_waited or 0.0, step.seconds)
    ]


@torch.no_grad()
def dense_forward_pass(model: PreTrainedModel, windows_NL: Tensor, *, batch_size: int) -> None:
    """Run the decoder, without its head, over this process's windows: the unit of cost for the other passes."""
    device = input_device(model)
    for ids_BL in torch.split(windows_of_process(windows_NL), batch_size):
        model.base_model(input_ids=ids_BL.to(device), use_cache=False)


def time_dense_forward_pass(context: RunContext) -> None:
    """Record the cost of a forward pass over the calibration windows as a step of the run.

    The whole model is dropped afterwards, because the plan of the devices' memory has no room for it.
    """
    windows_NL = context.inputs.windows
    # the first pass reads the weights from disk and is not timed
    dense_forward_pass(context.inputs.model, windows_NL[: world_size()], batch_size=1)
    with measure_step(context.folder.steps, FORWARD_PASS, tokens=windows_NL.numel()):
        dense_forward_pass(context.inputs.model, windows_NL, batch_size=context.batches.calibration.number)
    context.inputs.release()
    free_cached_memory()


def with_forward_ratios(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps; those that process calibration tokens get their cost in forward passes, where measured."""
    measured = [step.seconds for step in steps if step.name == FORWARD_PASS]
    forward = sum(measured) / len(measured) if measured else None
    return tuple(
        step.model_copy(update={"forward_ratio": round(step.seconds / forward, 3)})
        if forward and step.tokens_per_second
        else step
        for step in steps
    )
