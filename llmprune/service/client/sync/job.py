# Made from aio/job.py by make client; change that file.
"""A job of the service as Python code holds it: its events, log, files and report, and what can be done with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import quote

import httpx2 as httpx

from llmprune.common.errors import JobFailed, OutputError
from llmprune.results.load_report import parse_report
from llmprune.results.notebook.report_page import ReportPage
from llmprune.results.report_schema import Report
from llmprune.service.api.values import Artifact, FollowUps, JobPage
from llmprune.service.client.calls import (
    HASH_TIMEOUT,
    Call,
    JobSettings,
    hub_header,
    job_path,
    new_key,
    params_of,
    without_nothing,
)
from llmprune.service.client.downloads import Download, chosen_files, claim, require_inside
from llmprune.service.client.event_stream import Event
from llmprune.service.client.job_view import JobProgress, bundle_of, describe_failure
from llmprune.service.client.server import Attempts
from llmprune.service.client.sync.connection import Connection
from llmprune.service.client.sync.io import in_thread
from llmprune.service.jobs.follow_ups.work import Work
from llmprune.service.jobs.job import Job, JobSummary
from llmprune.service.monitoring.run_progress import RunProgress
from llmprune.service.monitoring.usage import JobUse
from llmprune.service.notifications.values import JobNotifications

_POLL = 1.0  # seconds between two looks at a job or its log


class JobHandle:
    """A job of a service. ``shown``: the job as the service last answered; ``refresh`` asks for it again."""

    def __init__(self, connection: Connection, shown: JobSummary) -> None:
        self._connection = connection
        self.shown = shown
        self.id = shown.id
        self._path = job_path(shown.id)

    def __repr__(self) -> str:
        return f"<job {self.id} {self.shown.name!r}: {self.shown.state}>"

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        """Return the job as a notebook shows it."""
        return bundle_of(self.shown)

    @property
    def state(self) -> str:
        """State of the job as last seen, such as running."""
        return self.shown.state

    def refresh(self) -> Job:
        """Ask the service for the job, with its recipe."""
        return self._changed(Call("GET", self._path, Job))

    def wait(self, *, timeout: float | None = None, check: bool = False) -> Job:
        """Wait until the job has ended, and return it.

        ``timeout``: seconds after which TimeoutError is raised. ``check``: raise JobFailed unless it has succeeded.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (job := self.refresh()).ended:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {self.id} is {job.state} after {timeout:g} s")
            self._connection.pause(_POLL)
        if check and job.state != "succeeded":
            raise JobFailed(describe_failure(job))
        return job

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """Yield every change of the job until it has ended; continues where the connection breaks.

        ``after``: only events after the one with this ``event_id``.
        """
        attempts = Attempts(self._connection.server)
        while True:
            pause = _POLL
            try:
                for event in self._connection.events(f"{self._path}/events", after):
                    after = event.event_id
                    attempts.succeeded()
                    yield event
                if self.refresh().ended:
                    return
            except httpx.TransportError as error:
                pause = attempts.after_break(error, kinds=(httpx.TransportError,))
            self._connection.pause(pause)

    def progress(self) -> None:
        """Show the job's progress until it has ended: a bar in a notebook and on a terminal, lines elsewhere.

        Interrupting it does not stop the job.
        """
        with JobProgress(self.shown) as view:
            for event in self.events():
                if view.is_status_due():
                    view.note(self.timeline(), self.usage())
                view.show(event)
            view.end(self.refresh())

    def timeline(self) -> RunProgress:
        """Return the steps of the run, the time left, the throughput, and the place in the queue."""
        return self._connection.ask(Call("GET", f"{self._path}/progress", RunProgress))

    def usage(self) -> JobUse:
        """Return samples of the processors, memory, GPUs and disk that the job has used."""
        return self._connection.ask(Call("GET", f"{self._path}/usage", JobUse))

    def notifications(self) -> JobNotifications:
        """Return who is told when the job ends, and what was sent."""
        return self._connection.ask(Call("GET", f"{self._path}/notifications", JobNotifications))

    def notify(self, *, urls: Sequence[str] = (), emails: Sequence[str] = ()) -> JobNotifications:
        """Replace the webhooks and e-mail addresses that are told when the job ends."""
        targets = {"urls": list(urls), "emails": list(emails)}
        return self._connection.ask(Call("PUT", f"{self._path}/notifications", JobNotifications, json=targets))

    def log(self, *, follow: bool = False) -> Iterator[str]:
        """Yield the lines of the job's log. ``follow``: wait for further lines until the job has ended."""
        offset, rest, ended = 0, "", not follow
        while True:
            part = self._connection.answer(Call("GET", f"{self._path}/log", str, {"offset": offset}))
            after = part.next_offset()
            *lines, rest = (rest + part.text()).split("\n")
            for line in lines:
                yield line
            if after == offset and ended:
                break
            if after == offset:
                ended = self.refresh().ended  # what it wrote before its end is read once more
                self._connection.pause(0.0 if ended else _POLL)
            offset = after
        if rest:
            yield rest

    def cancel(self) -> Job:
        """Cancel the job; the finished part is kept for a retry."""
        return self._changed(Call("POST", f"{self._path}/cancel", Job))

    def retry(self, *, hub_token: str | None = None) -> Job:
        """Queue the ended job again; it continues after one of the last finished layers."""
        return self._changed(Call("POST", f"{self._path}/retry", Job, headers=hub_header(hub_token)))

    def reevaluate(self, limit: int | None = None, *, hub_token: str | None = None) -> Job:
        """Evaluate the finished model on more samples. ``limit``: of each task; None: as many as the gate needs."""
        params = {"limit": limit}
        return self._changed(Call("POST", f"{self._path}/reevaluate", Job, params, hub_header(hub_token)))

    def share(self) -> Job:
        """Let every user of the service read the job."""
        return self._changed(Call("POST", f"{self._path}/share", Job))

    def unshare(self) -> Job:
        """Let only the job's owner and admins read it."""
        return self._changed(Call("POST", f"{self._path}/unshare", Job))

    def push(self, hub_token: str, *, repo_id: str, **settings: Any) -> JobHandle:
        """Push the finished model to the hub; return the job of the push. ``settings``: of a recipe's hub section."""
        headers = hub_header(hub_token) | new_key()
        content = without_nothing(settings) | {"repo_id": repo_id}
        call = Call("POST", f"{self._path}/push", Job, headers=headers, json=content)
        return JobHandle(self._connection, self._connection.ask(call))

    def pushes(self) -> list[JobSummary]:
        """Return the pushes of the job's model, the newest first."""
        return (self._connection.ask(Call("GET", "/v1/jobs", JobPage, {"source": self.id}))).jobs

    def follow_up(
        self,
        work: Work | Mapping[str, Any],
        *,
        key: str | None = None,
        hub_token: str | None = None,
        **settings: Unpack[JobSettings],
    ) -> JobHandle:
        """Ask for work on the finished job, such as ``{"kind": "size", "keep": 0.6}``; return the job that does it.

        It reuses what this one has. ``key``, ``hub_token`` and ``settings``: as of ``submit``.
        """
        asked = dict(work) if isinstance(work, Mapping) else work.model_dump(mode="json")
        content = without_nothing(params_of(settings, JobSettings)) | {"work": asked}
        headers = new_key(key) | hub_header(hub_token)
        call = Call("POST", f"{self._path}/follow-ups", Job, headers=headers, json=content)
        return JobHandle(self._connection, self._connection.ask(call))

    def follow_ups(self) -> FollowUps:
        """Return which work the job can have, and the jobs that were made from it."""
        return self._connection.ask(Call("GET", f"{self._path}/follow-ups", FollowUps))

    def delete(self) -> None:
        """Delete the ended job with all its files."""
        self._connection.answer(Call("DELETE", self._path, dict[str, Any]))

    def artifacts(self) -> list[Artifact]:
        """Return name and bytes of each file that the job's run wrote."""
        return self._connection.ask(Call("GET", f"{self._path}/artifacts", list[Artifact]))

    def checksums(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Return the SHA-256 of files of the ended job, by default of all."""
        params = {"name": list(names)}
        call = Call("GET", f"{self._path}/checksums", dict[str, str], params, timeout=HASH_TIMEOUT)
        return self._connection.ask(call)

    def fetch(
        self, folder: str | Path, *, names: Sequence[str] = (), model_only: bool = False, check: bool = True
    ) -> list[Path]:
        """Download files into a folder, by default all of them; complete files are not downloaded again.

        A download that broke continues. ``check``: compare each file of an ended job with the service's SHA-256.
        Raises OutputError where the folder has files of another job, or of this job before a retry.
        """
        folder, job = Path(folder), self.refresh()
        sizes = {file.name: file.bytes for file in self.artifacts()}
        wanted = chosen_files(self.id, list(sizes), names=names, model_only=model_only)
        require_inside(folder, wanted)
        keep = claim(folder, self.id, finished=job.finished, names=wanted)
        hashes = self.checksums(wanted if len(wanted) <= 50 else ()) if check and job.ended else {}
        for name in wanted:
            into = Download(folder / name, size=sizes[name], sha256=hashes.get(name), continues=keep)
            self._connection.download(f"{self._path}/artifacts/{quote(name)}", into)
        return [folder / name for name in wanted]

    def archive(self, file: str | Path, *, model_only: bool = False) -> Path:
        """Download the ended job's files as one tar archive. Raises OutputError where the file exists."""
        path = Path(file)
        if in_thread(path.exists):
            raise OutputError(f"{path} exists already; choose another file")
        part = "model" if model_only else "all"
        self._connection.download(f"{self._path}/archive?part={part}", Download(path))
        return path

    def report(self) -> Report:
        """Return the job's report. Raises OutputError where it is of another version of llmprune."""
        answer = self._connection.answer(Call("GET", f"{self._path}/report", dict[str, Any]))
        return parse_report(answer.json(dict[str, Any]), f"the report of job {self.id}", extra="ignore")

    def report_page(self) -> ReportPage:
        """Return the job's report page, which a notebook shows in a frame."""
        answer = self._connection.answer(Call("GET", f"{self._path}/report.html", str))
        return ReportPage(answer.text(), f"Report of {self.shown.name}")

    def _changed(self, call: Call[Job]) -> Job:
        """Send a call that answers with the job, and hold what it answers."""
        job = self._connection.ask(call)
        self.shown = job
        return job
