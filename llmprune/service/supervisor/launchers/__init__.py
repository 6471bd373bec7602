"""Launchers: where jobs run. A new launcher is one file here and one line in ``LAUNCHERS``."""

from __future__ import annotations

from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers.base import Launcher
from llmprune.service.supervisor.launchers.local import Local
from llmprune.service.supervisor.launchers.ray import Ray
from llmprune.service.supervisor.launchers.torchrun import Torchrun

LAUNCHERS: dict[str, type[Launcher]] = {  # by the name that a job gives
    "local": Local,
    "torchrun": Torchrun,
    "ray": Ray,
}


def offered_launchers(settings: Settings) -> dict[str, type[Launcher]]:
    """Return the launchers that jobs may ask for under these settings, by name."""
    return {name: launcher for name, launcher in LAUNCHERS.items() if launcher.is_offered(settings)}


def make_launchers(settings: Settings) -> dict[str, Launcher]:
    """Make every launcher that the settings offer, by name."""
    return {name: launcher.from_settings(settings) for name, launcher in offered_launchers(settings).items()}


def remote_launchers(settings: Settings) -> frozenset[str]:
    """Return the names of the offered launchers whose jobs use no slots and GPUs of this machine."""
    return frozenset(name for name, launcher in offered_launchers(settings).items() if not launcher.on_this_machine)
