"""Command line and environment of an attempt: a run, the evaluation of more samples, a follow-up, or a push."""

from __future__ import annotations

from pathlib import Path

from llmprune.recipe.hub import Hub
from llmprune.service.environment import hub_variables
from llmprune.service.jobs.hub_token import has_token, own_hub
from llmprune.service.jobs.job import BY_TASK, Job
from llmprune.service.settings import Settings
from llmprune.service.supervisor.follow_up_commands import base_option, follow_up_arguments
from llmprune.service.supervisor.launchers.base import Launch
from llmprune.service.supervisor.progress import PROGRESS, PUBLISHED


def launch_of(job: Job, settings: Settings) -> Launch:
    """Return the attempt that a job's row in the table asks for."""
    folder = settings.folder(job.id).absolute()
    own = has_token(folder) or job.push is not None  # a push never uses another token
    lent = settings.lend_hub_token and not own
    hub = own_hub(folder) if own else hub_variables(settings.hub_home)
    return Launch(
        job=job.id,
        attempt=job.attempts,
        folder=folder,
        arguments=_run(job, folder, settings=settings) if job.push is None else _push(job, job.push, settings=settings),
        gpus=job.gpus,
        devices=job.devices,
        environment={
            "LLMPRUNE_PROGRESS": str(folder / PROGRESS),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # the log is no terminal
            **({} if lent else hub),
        },
        keep_hub=lent,
        log_limit=settings.log_limit,
        uses=job.uses,
    )


def prepare(job: Job, folder: Path) -> None:
    """Write the recipe into the job's folder, and remove the progress of an earlier attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)
    (folder / "recipe.yaml").write_bytes(job.recipe.encode())


def _run(job: Job, folder: Path, *, settings: Settings) -> tuple[str, ...]:
    if job.reevaluate is not None:
        limit = () if job.reevaluate == BY_TASK else ("--limit", str(job.reevaluate))
        return ("reevaluate", str(folder / "run"), *limit, *base_option(job, folder, name="base"))
    if job.work is not None and job.reads is not None:
        return follow_up_arguments(job, job.work, folder=folder, parent=settings.run_folder(job.reads).absolute())
    sets = [part for override in job.overrides for part in ("--set", override)]
    scores = [] if job.reads is None else [f"--scores-of={settings.run_folder(job.reads).absolute()}"]
    return ("run", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *scores, *sets)


def _push(job: Job, hub: Hub, *, settings: Settings) -> tuple[str, ...]:
    """Return the arguments of a push. Options and values are joined with =, so that no value is read as an option."""
    assert job.source is not None, "a push has a source"
    given = {"repo-id": hub.repo_id, "branch": hub.branch, "when": hub.when, "commit-message": hub.commit_message}
    given |= {"quantized-repo-id": hub.quantized_repo_id}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += ["--private" if hub.private else "--public", *(["--create-pr"] if hub.create_pr else [])]
    source = settings.run_folder(job.source).absolute()
    saved = settings.run_folder(job.id).absolute() / PUBLISHED
    return ("push", str(source), *options, f"--save={saved}")
