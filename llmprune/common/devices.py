"""GPUs of a run, devices of models, and their names for people."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.common.errors import RecipeError
from llmprune.common.schema import format_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Devices = Literal["all"] | int | tuple[int, ...]  # as in a recipe: all, a number of GPUs, or their indices

_in_use: Devices = "all"  # GPUs that ``use_gpus`` left visible to this process


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's inputs belong on; an offloaded model takes and returns tensors on the CPU."""
    import torch

    return torch.device("cpu") if model.device.type == "meta" else model.device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or ``CPU, 2 threads``."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else device.type


def device_names(models: tuple[PreTrainedModel, ...]) -> str:
    """Return the names of the models' devices, each once, joined by ``and``."""
    return " and ".join(sorted({device_name(input_device(model)) for model in models}))


def choose_gpus(devices: Devices) -> tuple[int, ...]:
    """Return the indices of the chosen GPUs among those that torch sees; none: the CPU computes.

    Under a launcher all are chosen, for the launcher decides. Counts GPUs without initialising CUDA. Raises RecipeError
    for GPUs that are absent.
    """
    import torch

    from llmprune.common.distributed import has_launcher

    present = torch.cuda.device_count()
    if devices == "all" or devices == _in_use or has_launcher():  # mypy narrows only this form
        return tuple(range(present))
    chosen = tuple(range(devices)) if isinstance(devices, int) else devices
    absent = [gpu for gpu in chosen if gpu >= present]
    if absent:
        number = f"{devices} GPU{'s' * (devices != 1)}" if isinstance(devices, int) else ""
        asked = number or f"GPU{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
        raise RecipeError(
            f"devices: {asked} asked, and torch sees {visible_gpus()}; {'name these' if present else 'leave it out'}, "
            "or write devices: all, which uses what is there"
        )
    return chosen


def visible_gpus() -> str:
    """Return a phrase for the GPUs that torch sees, with the reason where something hides some."""
    import torch

    count = torch.cuda.device_count()
    there = f"GPUs 0 to {count - 1}" if count > 1 else "GPU 0 only" if count else "no GPU"
    if not count and not (torch.version.cuda or torch.version.hip):
        return f"{there} (torch {torch.__version__} is built for the CPU)"
    limits = [f"{name}={os.environ[name]}" for name in _visibility_variables() if name in os.environ]
    return f"{there} ({', '.join(limits)})" if limits else there


def visibility(gpus: Sequence[int]) -> dict[str, str]:
    """Return environment variables that leave a process only these GPUs, numbered from 0 in this order.

    ``gpus``: indices among the GPUs that this process sees.
    """
    import torch

    set_already = [name for name in _visibility_variables() if name in os.environ]
    names = os.environ[set_already[0]].split(",") if set_already else list(map(str, range(torch.cuda.device_count())))
    value = ",".join(names[gpu].strip() for gpu in gpus)
    return dict.fromkeys(set_already or ["CUDA_VISIBLE_DEVICES"], value)


def use_gpus(devices: Devices) -> None:
    """Leave only the chosen GPUs visible to this process and its children, numbered from 0 in their order.

    They stay the only ones until the process ends. Raises RecipeError for absent GPUs, and where CUDA was initialised
    before, because it reads the list of visible GPUs once.
    """
    global _in_use
    import torch

    gpus = choose_gpus(devices)
    if len(gpus) == torch.cuda.device_count() and list(gpus) == sorted(gpus):
        return
    variables = visibility(gpus)
    late = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not late:
        os.environ.update(variables)
        torch.cuda.init()  # type: ignore[no-untyped-call]
    if late or torch.cuda.device_count() != len(gpus):
        setting = " ".join(f"{name}={value}" for name, value in variables.items())
        raise RecipeError(
            f"devices: this process uses CUDA already, with {visible_gpus()}, and cannot be restricted to some of them "
            f"any more; start it with {setting} and devices: all"
        )
    _in_use = devices


def describe_gpus() -> tuple[str, str]:
    """Return a phrase for all visible GPUs, and a note that names the smallest where their memory differs."""
    import torch

    each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [(one.name, format_size(one.total_memory)) for one in each]
    described = ", ".join(f"{count} × {name} ({size})" for (name, size), count in Counter(names).items())
    sizes = [one.total_memory for one in each]
    smallest = sizes.index(min(sizes))
    # equal cards differ by a few MB: the driver keeps more of the one with a display
    if max(sizes) - sizes[smallest] < max(sizes) / 50:
        return described, ""
    return described, f"GPU {smallest} ({', '.join(names[smallest])}) has the least memory of them: it limits what fits"


def _visibility_variables() -> tuple[str, ...]:
    """Return the names of the variables that list visible GPUs, by precedence; ROCm reads CUDA's name as well."""
    import torch

    return ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if torch.version.hip else ("CUDA_VISIBLE_DEVICES",)
