"""Checks of a submission against the machines that its launcher uses."""

from __future__ import annotations

from llmprune.service.jobs.other_machines import node_gpus
from llmprune.service.jobs.store import JobStore
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers import LAUNCHERS, remote_launchers

NO_TOKEN = (
    "X-Hub-Token: hub tokens are not sent to machines without the service's data folder; leave it out, "
    "or choose the launcher local"
)


def has_data_folder(launcher: str, settings: Settings) -> bool:
    """Return whether the machines of a launcher have the data folder, with hub tokens of jobs."""
    return settings.artifacts is None or launcher not in remote_launchers(settings)


def launcher_problems(launcher: str, gpus: int, *, has_token: bool, settings: Settings, jobs: JobStore) -> list[str]:
    """Return what the machines of an offered launcher cannot do for a job."""
    problems = []
    most = _most_gpus(launcher, settings, jobs=jobs)
    if most is not None and gpus > most:
        problems.append(f"gpus: {gpus} asked and {LAUNCHERS[launcher].gpu_host} has {most}; ask for fewer")
    if has_token and not has_data_folder(launcher, settings):
        problems.append(NO_TOKEN)
    return problems


def _most_gpus(launcher: str, settings: Settings, *, jobs: JobStore) -> int | None:
    """Return the GPUs that a job may have; None where the cluster has not listed its nodes yet."""
    if LAUNCHERS[launcher].on_this_machine:
        return len(settings.gpus)
    known = node_gpus(jobs.database, launcher)
    return settings.ray_node_gpus if known is None else max(known, settings.ray_node_gpus or 0)
