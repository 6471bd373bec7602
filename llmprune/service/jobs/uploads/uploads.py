"""Uploads of finished run folders, file by file, which can be continued. A complete one becomes a job with its result.

The files arrive in the folder of the job that the upload becomes. Until then the job table does not have the job, so
that nobody can read them; an upload that gets no more bytes is deleted after a day.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from llmprune.common.errors import OutputError, RecipeError
from llmprune.common.files import write_text
from llmprune.common.schema import format_size
from llmprune.recipe.recipe import refuse_tokens
from llmprune.report.html.page import render_page
from llmprune.results.load_report import load_report
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.products import QUANTIZED_MODEL
from llmprune.service.database.database import Database, Row, Transaction
from llmprune.service.jobs.job import JOB_ID, VERDICTS, Job, Value, figures_of, job_of
from llmprune.service.jobs.library.library import write_labels
from llmprune.service.jobs.library.models import MAX_NOTES, MAX_TAGS, Labels, checked_tags
from llmprune.service.jobs.store import write_event
from llmprune.service.jobs.store_reads import Conflict, first_row, row_of
from llmprune.service.jobs.uploads.files import MAX_FILES, FileProgress, Upload, UploadFile, check_files, check_model
from llmprune.service.recipe_policy.yaml_limits import RECIPE_LIMIT
from llmprune.service.settings import Settings
from llmprune.service.users.quotas import Demand, check_quota, default_quotas, require_quota
from llmprune.service.users.tokens import Caller

UPLOAD_ID = JOB_ID
MAX_OPEN = 4  # uploads of one owner at a time
KEEP_SECONDS = 24 * 3600.0  # an upload that gets no bytes for so long is deleted
_ARCHIVE = "archive.tar"  # stands for the files of an archive until they are known
_ARRIVING = "arriving "  # begins the digest of such an upload, which no other one's does


class UploadRequest(Value):
    """A run folder to be uploaded."""

    files: tuple[UploadFile, ...] = Field(max_length=MAX_FILES, description="Its files.")
    name: str | None = Field(None, min_length=1, max_length=120, description="Name for people; default: the base.")
    shared: bool = Field(False, description="Every user with a token may read it.")
    tags: tuple[str, ...] = Field((), max_length=MAX_TAGS)
    notes: str = Field("", max_length=MAX_NOTES)

    def digest(self) -> str:
        """Return a digest of the request, by which an interrupted upload is found again."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class OpenUpload:
    """An upload that is not complete."""

    id: str
    owner: str
    request: UploadRequest
    folder: Path  # run folder

    def file(self, name: str) -> UploadFile | None:
        """Return a file of this name."""
        return next((file for file in self.request.files if file.name == name), None)

    def progress(self) -> Upload:
        """Return how much of each file has arrived."""
        files = [
            FileProgress(name=file.name, bytes=file.bytes, received=received_bytes(self.folder / file.name))
            for file in self.request.files
        ]
        return Upload(id=self.id, files=tuple(files))


class Uploads:
    """The uploads of a service."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database, self.settings = database, settings

    def begin(self, request: UploadRequest, caller: Caller) -> Upload:
        """Begin an upload, or return the same one of this caller as far as it is. Raises RecipeError and Conflict."""
        check_files(request.files)
        checked_tags(request.tags)
        self.remove_stale()
        digest, upload = request.digest(), secrets.token_hex(6)
        values = (upload, caller.name, digest, request.model_dump_json(), time.time())
        with self.database.write() as connection:
            done = _job_made(connection, caller.name, digest=digest)
            if done is not None:
                files = [FileProgress(name=one.name, bytes=one.bytes, received=one.bytes) for one in request.files]
                return Upload(id=done, files=tuple(files), job=done)
            known = first_row(connection, "SELECT * FROM uploads WHERE owner = ? AND digest = ?", caller.name, digest)
            if known is not None:
                return self._open(known).progress()
            self._require_room(connection, caller.name, sum(file.bytes for file in request.files))
            connection.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?)", values)
        self.settings.run_folder(upload).mkdir(parents=True, exist_ok=True)
        found = self.find(upload)
        assert found is not None, "it was written above"
        return found.progress()

    def begin_archive(self, request: UploadRequest, caller: Caller, *, size: int) -> OpenUpload:
        """Begin an upload whose files are not known yet, of at most ``size`` bytes. Raises as ``begin`` does."""
        checked_tags(request.tags)
        self.remove_stale()
        upload = secrets.token_hex(6)
        whole = UploadFile(name=_ARCHIVE, bytes=size, sha256="0" * 64)
        counted = request.model_copy(update={"files": (whole,)}).model_dump_json()
        with self.database.write() as connection:
            self._require_room(connection, caller.name, size)
            values = (upload, caller.name, _ARRIVING + upload, counted, time.time())
            connection.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?)", values)
        folder = self.settings.run_folder(upload)
        folder.mkdir(parents=True, exist_ok=True)
        return OpenUpload(upload, caller.name, request, folder)

    def finish_archive(self, upload: OpenUpload, files: tuple[UploadFile, ...]) -> Job:
        """Finish an upload whose files have all arrived, or return the job of the same request before.

        An upload of the same files that has not ended is deleted. Raises as ``finish`` does.
        """
        upload = replace(upload, request=upload.request.model_copy(update={"files": files}))
        digest, others = upload.request.digest(), list[str]()
        with self.database.write() as connection:
            done = _job_made(connection, upload.owner, digest=digest)
            if done is None:
                sql = "DELETE FROM uploads WHERE owner = ? AND digest = ? RETURNING id"
                others = [row["id"] for row in connection.execute(sql, (upload.owner, digest)).fetchall()]
                values = (digest, upload.request.model_dump_json(), time.time(), upload.id)
                connection.execute("UPDATE uploads SET digest = ?, request = ?, changed = ? WHERE id = ?", values)
            job = None if done is None else job_of(row_of(connection, done))
        for other in others:
            shutil.rmtree(self.settings.folder(other), ignore_errors=True)
        if job is None:
            return self.finish(upload)
        self.discard(upload.id)
        return job

    def find(self, upload: str) -> OpenUpload | None:
        """Return an upload file by file that is not complete; None where there is none."""
        rows = self.database.read("SELECT * FROM uploads WHERE id = ?", (upload,))
        return self._open(rows[0]) if rows and not rows[0]["digest"].startswith(_ARRIVING) else None

    def touch(self, upload: str) -> None:
        """Record that bytes have arrived."""
        with self.database.write() as connection:
            connection.execute("UPDATE uploads SET changed = ? WHERE id = ?", (time.time(), upload))

    def finish(self, upload: OpenUpload) -> Job:
        """Check a complete upload and make it a job with its result. Raises Conflict, RecipeError and QueueFull."""
        missing = [file for file in upload.progress().files if not (upload.folder / file.name).is_file()]
        if missing:
            raise Conflict(
                f"{missing[0].name} has {missing[0].received:,} of {missing[0].bytes:,} bytes; send the rest"
            )
        report = _checked_report(upload.folder)
        for name in ("model", QUANTIZED_MODEL):
            if name == "model" or (upload.folder / name).is_dir():
                check_model(upload.folder / name)
        write_text(upload.folder / "report.html", render_page(report))
        (self.settings.folder(upload.id) / "recipe.yaml").write_text(report.recipe_text, encoding="utf-8")
        return self._insert(upload, report)

    def discard(self, upload: str) -> None:
        """Delete an upload that is not complete, with its files."""
        with self.database.write() as connection:
            gone = connection.execute("DELETE FROM uploads WHERE id = ?", (upload,)).rowcount
        if gone:
            shutil.rmtree(self.settings.folder(upload), ignore_errors=True)

    def remove_stale(self) -> None:
        """Delete uploads that get no more bytes, and those of deleted users."""
        for row in self.database.read("SELECT id FROM uploads WHERE changed < ?", (time.time() - KEEP_SECONDS,)):
            self.discard(row["id"])

    def remove_broken(self) -> None:
        """Delete the archives that were arriving when the service ended."""
        for row in self.database.read("SELECT id FROM uploads WHERE digest LIKE ?", (f"{_ARRIVING}%",)):
            self.discard(row["id"])

    def _open(self, row: Row) -> OpenUpload:
        request = UploadRequest.model_validate_json(row["request"])
        return OpenUpload(row["id"], row["owner"], request, self.settings.run_folder(row["id"]))

    def _require_room(self, connection: Transaction, owner: str, size: int) -> None:  # noqa: PLR0917 - private
        """Raise Conflict, QueueFull and RecipeError where an upload of ``size`` bytes is not allowed."""
        rows = connection.execute("SELECT * FROM uploads WHERE owner = ?", (owner,)).fetchall()
        if len(rows) >= MAX_OPEN:
            raise Conflict(
                f"{len(rows)} uploads of yours are not complete, and {MAX_OPEN} may be; complete or delete one"
            )
        under_way = sum(file.bytes for row in rows for file in self._open(row).request.files)
        demand = Demand(waiting=0, size=under_way + size)
        require_quota(connection, owner, demand=demand, defaults=default_quotas(self.settings))
        if size > self.settings.upload_limit:
            limit = format_size(self.settings.upload_limit)
            raise RecipeError(f"{format_size(size)}; an upload has at most {limit} (serve --upload-limit)", "upload")
        free = shutil.disk_usage(self.settings.data_dir).free
        if size > free:
            raise RecipeError(f"{format_size(size)}, and the service has {format_size(free)} of free disk", "upload")

    def _insert(self, upload: OpenUpload, report: Report) -> Job:
        """Write the job's row, its labels and its event in one transaction, which also ends the upload."""
        request, values = upload.request, _columns(upload, report)
        names = ", ".join(values)
        with self.database.write() as connection:
            if not connection.execute("DELETE FROM uploads WHERE id = ?", (upload.id,)).rowcount:
                raise Conflict("the upload was completed or deleted meanwhile")
            quotas = default_quotas(self.settings)
            demand = Demand(jobs=0, waiting=0)  # its begin was counted as a submission
            check_quota(connection, upload.owner, demand=demand, defaults=quotas)
            connection.execute(
                f"INSERT INTO jobs ({names}) VALUES ({', '.join('?' * len(values))})", [*values.values()]
            )
            connection.execute(
                "INSERT INTO idempotency VALUES (?, ?, ?, ?)", (upload.owner, _key(request.digest()), "", upload.id)
            )
            write_event(connection, upload.id, kind="uploaded", by=upload.owner)
            labels = Labels(tags=request.tags, notes=request.notes)
            write_labels(connection, upload.id, labels=labels, by=upload.owner)
            return job_of(row_of(connection, upload.id))


def received_bytes(path: Path) -> int:
    """Return the bytes of a file that have arrived."""
    for one in (path, partial_of(path)):
        try:
            return one.stat().st_size
        except OSError:
            continue
    return 0


def partial_of(path: Path) -> Path:
    """Return the place of a file that has not arrived completely."""
    return path.with_name(f".{path.name}.partial")


def _checked_report(folder: Path) -> Report:
    """Read the report of an uploaded run. Raises RecipeError."""
    try:
        report = load_report(folder)
    except OutputError as error:
        raise RecipeError(str(error), "upload") from error
    if len(report.recipe_text.encode()) > RECIPE_LIMIT:
        raise RecipeError(f"the recipe in report.json has more than {RECIPE_LIMIT:,} bytes", "upload")
    refuse_tokens(report.recipe_text, report.overrides, source="upload")
    return report


def _columns(upload: OpenUpload, report: Report) -> dict[str, Any]:
    """Return the columns of the job of an uploaded run."""
    verdict = report.gate.verdict if report.gate else "pass"
    state, now, model = VERDICTS[verdict], time.time(), report.provenance.model
    figures = figures_of(report.model_dump())
    return {
        "id": upload.id, "owner": upload.owner, "model": model[:500], "recipe": report.recipe_text,
        "name": (upload.request.name or model.rstrip("/").rsplit("/", 1)[-1] or "model")[:120],
        "overrides": json.dumps(list(report.overrides)), "launcher": "local", "gpus": 0, "priority": 0,
        "state": state, "exit_code": 0 if state == "succeeded" else 3, "fraction": 1.0, "attempts": 0,
        "error": None if state == "succeeded" else f"the gate of the uploaded run: {verdict}",
        "figures": figures.model_dump_json(), "shared": int(upload.request.shared), "uploaded": 1,
        "created": now, "finished": now,
    }  # fmt: skip


def _job_made(connection: Transaction, owner: str, *, digest: str) -> str | None:
    """Return the id of the job that the same upload has become."""
    row = first_row(connection, "SELECT job FROM idempotency WHERE owner = ? AND key = ?", owner, _key(digest))
    return None if row is None else str(row["job"])


def _key(digest: str) -> str:
    """Return the idempotency key of a completed upload, which no header can hold."""
    return f"upload\n{digest}"
