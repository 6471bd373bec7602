"""Time that a planned run will take on the device of this process."""

from __future__ import annotations

import torch

from llmprune.common.devices import device_name
from llmprune.common.distributed import local_device, world_size
from llmprune.planning.duration.estimate import Durations, durations, parts_with
from llmprune.planning.duration.rates import known_rates, rates_of
from llmprune.planning.plan import Plan


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
        loading=loading,
    )


def with_durations(plan: Plan, *, processes: int = 1, loading: float | None = None) -> Plan:
    """Return the plan with the durations of a run without options (``estimate_durations``)."""
    return plan.model_copy(update={"durations": estimate_durations(plan, processes=processes, loading=loading)})


def with_known_durations(plan: Plan) -> Plan:
    """Return the plan with its durations where the device's rates are kept; measures nothing."""
    device = local_device()
    rates = known_rates(device, _dtype(plan), hidden=plan.work.hidden)
    if rates is None:
        return plan
    found = durations(plan.work.parts, rates, device=device_name(device), processes=world_size())
    return plan.model_copy(update={"durations": found})


def _dtype(plan: Plan) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype
