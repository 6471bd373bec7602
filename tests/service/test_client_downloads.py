"""Downloads of the Python client: broken connections, checksums and missing files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from helpers.service_answers import ENDED, JOB, page, talking_to

from llmprune.common.errors import RecipeError, ServiceError, ServiceUnreachable


class Cut:
    """A service with one file, whose connection breaks after each ``step`` bytes while ``breaks`` are left."""

    def __init__(self, content: bytes, *, step: int, breaks: int) -> None:
        self.content, self.step, self.breaks = content, step, breaks
        self.ranges: list[str | None] = []
        self.sha256 = hashlib.sha256(content).hexdigest()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer the requests of fetch."""
        if request.url.path.endswith("/artifacts"):
            return httpx.Response(200, json=[{"name": "model/w", "bytes": len(self.content)}])
        if request.url.path.endswith("/checksums"):
            return httpx.Response(200, json={"model/w": self.sha256})
        if not request.url.path.endswith("/model/w"):
            return httpx.Response(200, json=ENDED)
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=")[:-1]) if asked else 0
        whole = len(self.content)
        headers = {"Content-Range": f"bytes {start}-{whole - 1}/{whole}"} if start else {}
        return httpx.Response(206 if start else 200, headers=headers, content=self._body(start))

    def _body(self, start: int) -> Iterator[bytes]:
        if self.breaks:
            self.breaks -= 1
            yield self.content[start : start + self.step]
            raise httpx.ReadError("connection reset")
        yield self.content[start:]


def test_a_broken_download_continues(tmp_path: Path) -> None:
    """More breaks than attempts are no matter while bytes arrive; the rest is asked for, never the whole again."""
    service = Cut(b"0123456789" * 10, step=10, breaks=8)
    with talking_to(service) as client:
        (path,) = client.job(JOB).fetch(tmp_path / "out")
    assert path.read_bytes() == service.content
    assert service.ranges == [None, *(f"bytes={10 * number}-" for number in range(1, 9))]


def test_a_download_continues_in_a_later_call(tmp_path: Path) -> None:
    """What a call that gave up has left is continued by the next one, and nothing else is left at the end."""
    service = Cut(b"0123456789" * 10, step=0, breaks=99)
    (tmp_path / "out" / "model").mkdir(parents=True)
    with talking_to(service) as client:
        job = client.job(JOB)
        with pytest.raises(ServiceUnreachable, match="does not finish its answer"):
            job.fetch(tmp_path / "out")
        (tmp_path / "out" / "model" / ".w.partial").write_bytes(service.content[:30])
        service.breaks = 0
        job.fetch(tmp_path / "out")
        assert service.ranges[-1] == "bytes=30-"
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [".llmprune-job.json", "model", "w"]


def test_a_file_that_is_not_what_was_announced_is_not_kept(tmp_path: Path) -> None:
    """Another SHA-256 is an error; a file here that differs is fetched again, one that fits is not."""
    service = Cut(b"0123456789", step=0, breaks=0)
    service.sha256 = "0" * 64
    with talking_to(service) as client:
        job = client.job(JOB)
        with pytest.raises(ServiceError, match="a file whose SHA-256 is not 0000"):
            job.fetch(tmp_path / "out")
        assert not list((tmp_path / "out" / "model").iterdir())
        service.sha256 = hashlib.sha256(service.content).hexdigest()
        (path,) = job.fetch(tmp_path / "out")
        path.write_bytes(b"damaged!!!")
        job.fetch(tmp_path / "out")
        sent = len(service.ranges)
        job.fetch(tmp_path / "out")
    assert (path.read_bytes(), len(service.ranges)) == (service.content, sent)


@pytest.mark.parametrize("names", [["nothing.txt"], None])
def test_a_job_without_files_is_said(names: list[str] | None, tmp_path: Path) -> None:
    """A missing name lists what there is; a job without any file has nothing to download."""

    def answer(request: httpx.Request) -> httpx.Response:
        return page(b"[]") if "artifacts" in request.url.path else httpx.Response(200, json=ENDED)

    told = pytest.raises(RecipeError, match="nothing yet" if names else "no files to download")
    with talking_to(answer) as client, told:
        client.job(JOB).fetch(tmp_path / "out", names=names or ())
