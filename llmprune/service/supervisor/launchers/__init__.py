"""Where jobs run: one launcher a file, made by the name that a job gives."""

from __future__ import annotations

from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers.base import Launcher
from llmprune.service.supervisor.launchers.local import Local
from llmprune.service.supervisor.launchers.ray import Ray
from llmprune.service.supervisor.launchers.torchrun import Torchrun


def make_launchers(settings: Settings) -> dict[str, Launcher]:
    """Every launcher that the settings allow, by name."""
    launchers: dict[str, Launcher] = {
        "local": Local(settings.command),
        "torchrun": Torchrun(settings.command, settings.torchrun_options),
    }
    if settings.ray:
        launchers["ray"] = Ray(settings.ray, settings.command, grace=settings.grace)
    return launchers
