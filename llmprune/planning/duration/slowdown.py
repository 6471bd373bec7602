"""How much longer a computation takes because other programs use the processors."""

from __future__ import annotations

import os

import torch


def slowdown(device: torch.device) -> float:
    """Return the factor on the time of a computation on a device, from the load of the last minute; 1 on a GPU.

    A process with T threads on C processors, beside a load L, gets C / (L + T) of the time that it needs.
    """
    if device.type != "cpu" or not hasattr(os, "getloadavg"):  # not on Windows
        return 1.0
    processors, load = os.cpu_count() or 1, os.getloadavg()[0]
    return round(max((load + torch.get_num_threads()) / processors, 1.0), 2)
