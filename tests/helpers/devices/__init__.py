"""Simulated CUDA devices: CPU tensors whose storages carry the name of a device.

    with simulated_devices(2, memory=64 << 20) as devices:    # torch.cuda.is_available() is True
        model = load_model(ModelSource(id=folder, device_map={"": "cuda:1"}))
    devices.peak["cuda:1"]                                    # most bytes of live storages
    devices.waits["layerwise/forward.py:128"]                 # how often this line of llmprune waited for a device
    devices.copies[CopyKind.TO_DEVICE_PAGEABLE, "layerwise/forward.py:107"]

Values are computed on the CPU, to the bit as without the simulation. What the code does wrongly raises:

- RuntimeError where an operation gets tensors of two devices,
- torch.OutOfMemoryError where the live storages of a device would exceed its memory,
- RuntimeError where a tensor is used before the copy or operation that writes it, on another stream or beside the host,
  is ordered before that use; where a buffer is overwritten that such a copy still reads; and where memory is allocated
  that another stream may still use, for a tensor was freed without ``record_stream``.

Not simulated: kernels of a GPU, their rounding and random numbers, and what C++ does within one call.

Modules: ``mode`` sees calls of torch, ``operations`` knows the rules of single operations, ``copies`` moves,
``storages`` and ``streams`` hold what is where and what is ordered, ``lines`` names the code, ``patches`` replaces the
functions of ``torch.cuda``.
"""

from __future__ import annotations

from helpers.devices.copies import CopyKind
from helpers.devices.mode import SimulatedDevices
from helpers.devices.patches import simulated_devices
from helpers.devices.storages import home_of

__all__ = ["CopyKind", "SimulatedDevices", "home_of", "simulated_devices"]
