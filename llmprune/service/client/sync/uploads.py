# Made from aio/uploads.py by make client; change that file.
"""Methods of the client for uploads of run folders into the model library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import quote

from llmprune.common.errors import ServiceError
from llmprune.service.client.calls import Call, UploadSettings, checked_id, job_path, params_of, without_nothing
from llmprune.service.client.run_files import LocalFile, read_part, run_files
from llmprune.service.client.sync.connection import Connection
from llmprune.service.client.sync.io import in_thread
from llmprune.service.client.sync.job import JobHandle
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.uploads.files import FileProgress, Upload

_LONG = 600.0  # seconds; the service hashes a file with its last part
_TRIES = 5  # to go on with a file after a refusal


class UploadMethods:
    """Uploads, which continue where an earlier one was interrupted."""

    connection: Connection

    def upload(
        self,
        folder: str | Path,
        *,
        progress: Callable[[int, int], object] = lambda sent, total: None,
        **settings: Unpack[UploadSettings],
    ) -> JobHandle:
        """Upload a finished run folder, or its archive, and return its job. An interrupted upload is continued.

        ``progress`` gets the bytes sent and the bytes in all. ``settings``: name, shared, tags, notes.
        Raises OutputError where it is no finished run.
        """
        given = without_nothing(params_of(settings, UploadSettings))
        with run_files(Path(folder)) as files:
            described = [in_thread(file.described) for file in files]
            call = Call("POST", "/v1/models/uploads", Upload, json={"files": described, **given})
            begun = self.connection.ask(call)
            if begun.job:
                return JobHandle(self.connection, self.connection.ask(Call("GET", job_path(begun.job), Job)))
            total, sent = sum(file.size for file in files), 0
            received = {file.name: file.received for file in begun.files}
            for file in files:
                for arrived in self._send_file(begun.id, file, received=received.get(file.name, 0)):
                    progress(sent + arrived, total)
                sent += file.size
            finish = Call("POST", f"/v1/models/uploads/{begun.id}/finish", Job, timeout=_LONG)
            return JobHandle(self.connection, self.connection.ask(finish))

    def delete_upload(self, upload: str) -> None:
        """Delete an upload that is not complete, with what has arrived of it."""
        path = f"/v1/models/uploads/{checked_id(upload, kind='upload', listed_by='it is in the address of its files')}"
        self.connection.answer(Call("DELETE", path, dict[str, Any]))

    def _send_file(self, upload: str, file: LocalFile, *, received: int) -> Iterator[int]:
        """Send the rest of a file; yield how much of it has arrived after each part."""
        failures = 0
        with file.open() as source:
            while received < file.size or (not file.size and not failures):
                part = in_thread(read_part, source, received)
                path = f"/v1/models/uploads/{upload}/files/{quote(file.name)}"
                try:
                    call = Call("PUT", path, FileProgress, {"offset": received}, content=part, timeout=_LONG)
                    self.connection.ask(call)
                    received += len(part)
                    if not file.size:
                        return
                except ServiceError:  # a part may have arrived whose answer was lost
                    failures += 1
                    state = self.connection.ask(Call("GET", f"/v1/models/uploads/{upload}", Upload))
                    known = next((one.received for one in state.files if one.name == file.name), 0)
                    if failures >= _TRIES or known == received:
                        raise
                    received = known
                yield received
