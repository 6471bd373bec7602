"""The words of libraries that a person who runs llmprune does not need."""

from __future__ import annotations

import logging

from llmprune.common.libraries import quiet_libraries


def test_no_kernels_are_advertised() -> None:
    """bitsandbytes, which peft imports, asks for a package that nothing here uses; its faults are shown."""
    quiet_libraries()
    kernels, library = (logging.getLogger(f"bitsandbytes.{name}") for name in ("backends.cpu.ops", "cextension"))
    assert not kernels.isEnabledFor(logging.WARNING)
    assert kernels.isEnabledFor(logging.ERROR)
    assert library.isEnabledFor(logging.WARNING)
