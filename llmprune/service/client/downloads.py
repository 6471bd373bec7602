"""Downloads: folders that hold the files of one job, from one end of that job, and files that are being downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpx2 as httpx

from llmprune.common.errors import OutputError, RecipeError, ServiceError
from llmprune.common.files import sha256_of, write_text
from llmprune.common.paths import is_inside, is_plain_path
from llmprune.service.client.answers import Answer, SizeLimit

MARK = ".llmprune-job.json"


def claim(folder: Path, job: str, *, finished: float | None, names: Sequence[str]) -> bool:
    """Write into a folder which job its files belong to; return whether files in it can be kept.

    ``finished``: when the job ended; None while it runs, for its files still change. Raises OutputError where the
    folder has files of another job, of an earlier end of this job, or files of these names of unknown origin.
    """
    mine = {"job": job, "finished": finished}
    known = _read(folder)
    if known is None:
        taken = [name for name in names if (folder / name).exists()]
        if taken:
            raise OutputError(
                f"{folder} has {taken[0]} already, and no record of which job it belongs to; choose another --output"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the folder {folder} cannot be made: {error}; choose another --output") from error
        write_text(folder / MARK, json.dumps(mine) + "\n")
        return False
    if known.get("job") != job:
        raise OutputError(f"{folder} has the files of job {known.get('job')}; choose another --output")
    if known != mine:
        raise OutputError(
            f"{folder} has files of job {job} from before it ended last, and some may differ now; "
            "choose another --output, or remove the folder"
        )
    return finished is not None


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the record of an earlier download; None where there is none."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder / MARK} cannot be read: {error}; choose another --output") from error
    return found if isinstance(found, dict) else {}


def chosen_files(job: str, there: Sequence[str], *, names: Sequence[str], model_only: bool) -> list[str]:
    """Return the files to download, by default all. Raises RecipeError where the job does not have one of them."""
    missing = [name for name in names if name not in there]
    if missing:
        raise RecipeError(f"job {job} has no {', '.join(missing)}; it has: {', '.join(there) or 'nothing yet'}")
    chosen = [name for name in (names or there) if not model_only or name.startswith("model/")]
    if not chosen:
        raise RecipeError(f"job {job} has no {'model' if model_only else 'files'} to download; it has not finished")
    return chosen


def require_inside(folder: Path, names: Sequence[str]) -> None:
    """Raise ServiceError where the service names a file outside of the folder."""
    for name in names:
        if not is_plain_path(name) or not is_inside(folder / name, folder):
            raise ServiceError(f"the service named the file {name!r}, which is outside {folder}")


@dataclass
class Download:
    """A file that is being downloaded, beside its final place until it is complete.

    ``size``: bytes of the whole file; None: as the first answer says. ``sha256``: of the whole file; None: not checked.
    ``continues``: what an earlier download left of it belongs to this file.
    """

    path: Path
    size: int | None = None
    sha256: str | None = None
    continues: bool = False
    _etag: str = ""  # of the file that the first answer began

    @property
    def partial(self) -> Path:
        """File with the part that is here."""
        return self.path.with_name(f".{self.path.name}.partial")

    def is_here(self) -> bool:
        """Check that the complete file is here already."""
        if not self.continues or not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        return self.sha256 is None or sha256_of(self.path) == self.sha256

    def begin(self) -> None:
        """Make the file's folder, and remove a part of another file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.continues:
            self.partial.unlink(missing_ok=True)

    @property
    def have(self) -> int:
        """Bytes that are here."""
        return self.partial.stat().st_size if self.partial.is_file() else 0

    def headers(self) -> dict[str, str]:
        """Return the headers that ask for the rest of the file."""
        if not self.have or (self.size is not None and self.have >= self.size):
            return {}
        return {"Range": f"bytes={self.have}-"} | ({"If-Range": self._etag} if self._etag else {})

    @contextmanager
    def receiving(self, response: httpx.Response) -> Iterator[tuple[BinaryIO, SizeLimit]]:
        """Yield the file to write an answer into, and the limit of what it may get.

        The answer's body continues the part that is here, or is the whole file. Raises ServiceError for another one.
        """
        begins = self.have if response.status_code == 206 else 0
        found = re.match(r"bytes (\d+)-\d+/(\d+)$", response.headers.get("Content-Range", ""))
        if response.status_code == 206 and (not found or int(found[1]) != begins):
            raise Answer.head(response).unreadable(f"the range {response.headers.get('Content-Range', '')[:100]!r}")
        if self.size is None:
            length = response.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise Answer.head(response).unreadable("a file of unknown size")
            self.size = begins + int(length)
        self._etag = response.headers.get("ETag", "") or self._etag
        limit = SizeLimit(response, self.size)
        limit.size = begins
        with self.partial.open("ab" if begins else "wb") as file:
            yield file, limit

    def finish(self, head: Answer) -> None:
        """Put the complete file in its place. Raises ServiceError where it is not the file that was announced."""
        if self.have != self.size:
            raise head.unreadable(
                f"{self.have:,} bytes of a file listed with {self.size:,} (a job that still runs may have changed it)"
            )
        if self.sha256 is not None and sha256_of(self.partial) != self.sha256:
            raise head.unreadable(f"a file whose SHA-256 is not {self.sha256}, as the service lists it")
        self.partial.replace(self.path)
