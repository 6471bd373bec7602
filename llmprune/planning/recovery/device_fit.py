"""Choose the way of training that fits the device, and say what would fit where none does."""

from __future__ import annotations

from dataclasses import replace

from llmprune.common.schema import format_size
from llmprune.planning.duration.parts import PlannedModels
from llmprune.planning.memory.machine import Device, Machine
from llmprune.planning.recovery.memory import TrainingSetting, length_of, memory_of_training
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.recover import Recover


def recovery_shortage(recipe: Recipe, models: PlannedModels, *, machine: Machine) -> str | None:
    """Return why the training does not fit the device that computes, and what would; None where it fits."""
    recover = recipe.recover
    if recover is None:
        return None
    device, length = machine.devices[0], length_of(recover.data.resolved(recipe.calibration))
    setting = replace(setting_on(recover, models, machine=machine, length=length), windows=1)
    needed = memory_of_training(recover, models, setting=setting)
    if needed.total <= device.total:
        return None
    remedies = [*_fitting(recover, models, setting=setting, machine=machine), "use a machine with more memory"]
    return (
        f"recover: {device.name} has {format_size(device.total)}, and method: {recover.method} needs "
        f"{format_size(needed.total)}: weights {format_size(needed.weights)}, gradients and optimiser "
        f"{format_size(needed.optimiser)}, activations of one window {format_size(needed.activations)}; "
        f"{', or '.join(remedies)}"
    )


def setting_on(recover: Recover, models: PlannedModels, *, machine: Machine, length: int) -> TrainingSetting:
    """Return the way in which a run trains on this machine."""
    on_gpu, asked = machine.has_gpu, recover.checkpointing
    at_once = recover.windows_at_once(length, on_gpu=on_gpu)
    windows = min(at_once, recover.windows_of_step(recover.tokens, length)) if recover.tokens else at_once
    setting = TrainingSetting(recover.method, length, on_gpu, on_gpu if asked == "auto" else asked, windows)
    if asked == "auto" and memory_of_training(recover, models, setting=setting).total > machine.devices[0].total:
        return replace(setting, checkpointing=True)
    return setting


def _fitting(recover: Recover, models: PlannedModels, *, setting: TrainingSetting, machine: Machine) -> list[str]:
    """Return the changes with which the training would fit, each with the memory that it then needs."""
    device, found = machine.devices[0], []

    def fits(one: TrainingSetting, on: Device, *, remedy: str) -> bool:
        needed = memory_of_training(recover, models, setting=one).total
        if needed <= on.total:
            found.append(f"{remedy} ({format_size(needed)})")
        return needed <= on.total

    if recover.embeddings:
        recover = recover.model_copy(update={"embeddings": False})
        fits(setting, device, remedy="leave out recover.embeddings")
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
