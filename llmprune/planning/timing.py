"""Time that a planned run will take on the device of this process."""

from __future__ import annotations

import torch

from llmprune.common.devices import device_name
from llmprune.common.distributed import local_device, world_size
from llmprune.planning.checks import ErrorCollector
from llmprune.planning.duration.estimate import Durations, durations, parts_with
from llmprune.planning.duration.measured import as_measured
from llmprune.planning.duration.rates import known_rates, rates_of
from llmprune.planning.duration.slowdown import slowdown
from llmprune.planning.plan import plan_structure
from llmprune.planning.plan_schema import Plan
from llmprune.recipe.recipe import Recipe


def estimate_durations(
    plan: Plan,
    *,
    processes: int = 1,
    loading: float | None = None,
    measures_forward: bool = False,
    checks_calibration: bool = False,
) -> Durations | None:
    """Return the durations of a planned run; measures the device's rates where they are not kept.

    None where the device's memory is too full for that.

    ``processes``: number that the run will start; under a launcher there are as many as that started. ``loading``:
    seconds in which this process loaded the libraries, None where that was not measured. ``measures_forward``,
    ``checks_calibration``: options of the run.
    """
    device = local_device()
    rates = rates_of(device, _dtype(plan), hidden=plan.work.hidden)
    if rates is None:
        return None
    return durations(
        parts_with(plan.work, measures_forward=measures_forward, checks_calibration=checks_calibration),
        rates,
        device=device_name(device),
        processes=max(processes, world_size()),
        slowdown=slowdown(device),
        loading=loading,
    )


def with_durations(plan: Plan, *, processes: int = 1, loading: float | None = None) -> Plan:
    """Return the plan with the durations of a run without options (``estimate_durations``)."""
    return plan.model_copy(update={"durations": estimate_durations(plan, processes=processes, loading=loading)})


def with_expected_durations(plan: Plan, recipe: Recipe) -> Plan:
    """Return the plan with the durations that earlier runs of its model let expect, beside those of the estimate.

    The rates of a CPU are measured where they are not kept. Those of a GPU are not, because jobs need its memory: until
    a run has measured them there are no durations.
    """
    device = local_device()
    rates_on = rates_of if device.type == "cpu" else known_rates
    rates = rates_on(device, _dtype(plan), hidden=plan.work.hidden)
    if rates is None:
        return plan
    name, busy = device_name(device), slowdown(device)
    found = durations(plan.work.parts, rates, device=name, processes=world_size(), slowdown=busy)
    return plan.model_copy(update={"durations": as_measured(found, recipe)})


def expected_durations(recipe: Recipe) -> Durations | None:
    """Return how long a recipe is expected to run, from the model's config alone: text and tasks are not looked up.

    None where the model cannot be planned, or there are no rates. The run will have other GPUs than this process.
    """
    plan, _ = plan_structure(recipe, ErrorCollector(), elsewhere=True)
    return None if plan is None else with_expected_durations(plan, recipe).durations


def _dtype(plan: Plan) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype
