"""Electrical energy of some work, from the device's own meters.

GPUs: the power that NVML reports (the package nvidia-ml-py; amdsmi for AMD), once a second. CPUs: the energy counters
of Linux (RAPL), which mostly only root may read. Whatever else runs on these devices is included; memory outside the
packages, disks and the power supply are not. Where nothing can be read the energy is unknown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from llmprune.common.distributed import is_first_process, local_device, sum_over_processes, world_size

POWERCAP = Path("/sys/class/powercap")
_PERIOD = 1.0  # seconds between readings; a package's counter wraps after minutes
_JOULES_PER_KILOWATT_HOUR = 3.6e6
Meter = Callable[[float], float]  # joules since the last call; its argument: seconds since then


class EnergyMeter:
    """Meter of the energy of a block: of this process's GPUs, or of the machine's CPUs in the first process.

    ``kilowatt_hours`` is known after the block; None where the devices have no meter that can be read.
    """

    def __init__(self, meters: Sequence[Meter] | None = None) -> None:
        self.kilowatt_hours: float | None = None
        self._meters = own_meters() if meters is None else tuple(meters)
        self._joules, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy meter", daemon=True)

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        if self._read():
            self._joules = 0.0
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
            if self._read():
                self.kilowatt_hours = self._joules / _JOULES_PER_KILOWATT_HOUR

    def _watch(self) -> None:
        while not self._ended.wait(_PERIOD) and self._read():
            pass

    def _read(self) -> bool:
        """Add the joules since the last reading; without meters, or where one fails, return False."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        try:
            self._joules += sum(meter(seconds) for meter in self._meters)
        except Exception:  # of NVML, amdsmi or the file system: an unknown energy must not end a training
            self._meters = ()
        return bool(self._meters)


def total_kilowatt_hours(meter: EnergyMeter) -> float | None:
    """Return the sum over all processes, which all call this; None where one does not know its own."""
    import torch

    own = meter.kilowatt_hours
    if own is None and local_device().type == "cpu" and not is_first_process():
        own = 0.0  # the first process reads the counters of all CPUs
    total = torch.tensor([float("nan") if own is None else own], dtype=torch.float64)
    sum_over_processes([total])
    return None if total.isnan() else float(total)


def own_meters(powercap: Path = POWERCAP) -> tuple[Meter, ...]:
    """Return the meters of this process's devices: all visible GPUs for one process, its own for one of several."""
    device = local_device()
    if device.type == "cuda":
        import torch

        gpus = range(torch.cuda.device_count()) if world_size() == 1 else [device.index or 0]
        return tuple(_power_sensor(gpu) for gpu in gpus)
    if not is_first_process():
        return ()
    return tuple(_EnergyCounter(folder) for folder in sorted(powercap.glob("intel-rapl:?")))


def _power_sensor(gpu: int) -> Meter:
    def joules(seconds: float) -> float:
        import torch

        return float(torch.cuda.power_draw(gpu)) / 1000 * seconds

    return joules


class _EnergyCounter:
    """Counter of one CPU package, in microjoules; it starts again at 0 above its range."""

    def __init__(self, folder: Path) -> None:
        self._file, self._range = folder / "energy_uj", folder / "max_energy_range_uj"
        self._last: int | None = None

    def __call__(self, _: float) -> float:
        now = int(self._file.read_text(encoding="ascii"))
        before, self._last = self._last, now
        if before is None:
            return 0.0
        spent = now - before if now >= before else now + int(self._range.read_text(encoding="ascii")) - before
        return spent / 1e6
