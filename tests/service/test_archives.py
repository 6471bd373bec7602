"""The files of a job as one tar archive, and their SHA-256."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.service import ServiceHarness, recipe

from llmprune.service.api.files.tar_stream import FileChanged, Member, TarStream


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with one ended job."""
    return ServiceHarness(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="module")
def job(harness: ServiceHarness) -> str:
    """An ended job with files that may not get out, and a name that needs a long header."""
    job: str = harness.submit(recipe(page="/etc/secret/x"))["id"]
    harness.until_ended(job)
    folder = harness.run_folder(job)
    (folder / "model" / f"{'long-' * 40}é.txt").write_text("y" * 700)
    (folder / ".hidden").write_text("x")
    (folder / "link.json").symlink_to("/etc/passwd")
    (folder / "links").symlink_to("/etc")
    return job


def contents(archive: bytes) -> dict[str, bytes]:
    """The files of an archive by name; all of its members are plain files of nobody."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = tar.getmembers()
        assert all(one.isreg() and (one.uid, one.uname, one.mode) == (0, "", 0o644) for one in members)
        return {one.name: (tar.extractfile(one) or io.BytesIO()).read() for one in members}


def test_an_archive_has_the_files_as_they_are_shown(harness: ServiceHarness, job: str) -> None:
    """Every artefact as its own download has it, of known length, the same each time; hidden files and links stay."""
    answer = harness.http.get(f"/v1/jobs/{job}/archive")
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"] == f'attachment; filename="{job}.tar"'
    assert answer.content == harness.http.get(f"/v1/jobs/{job}/archive").content
    found = contents(answer.content)
    listed = [file["name"] for file in harness.http.get(f"/v1/jobs/{job}/artifacts").json()]
    assert list(found) == sorted(listed)
    assert not [name for name in found if "hidden" in name or "link" in name]
    for name, content in found.items():
        assert content == harness.http.get(f"/v1/jobs/{job}/artifacts/{name}").content
    assert b"/etc/secret" not in answer.content
    model = contents(harness.http.get(f"/v1/jobs/{job}/archive", params={"part": "model"}).content)
    assert model == {name: content for name, content in found.items() if name.startswith("model/")}


def test_checksums_are_those_of_the_downloads(harness: ServiceHarness, job: str) -> None:
    """Each file's SHA-256 is that of its download, also the second time, from the cache; unknown names are refused."""
    answers = [harness.http.get(f"/v1/jobs/{job}/checksums").json() for _ in range(2)]
    found = contents(harness.http.get(f"/v1/jobs/{job}/archive").content)
    assert answers == [{name: hashlib.sha256(content).hexdigest() for name, content in found.items()}] * 2
    path = harness.run_folder(job) / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    name = {"name": "model/model.safetensors"}
    assert harness.http.get(f"/v1/jobs/{job}/checksums", params=name).json() == {
        "model/model.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()
    }
    assert harness.http.get(f"/v1/jobs/{job}/checksums", params={"name": "../log.txt"}).status_code == 404


@pytest.mark.parametrize("first", ["1", "511", "512", "5000"])
def test_a_download_continues(harness: ServiceHarness, job: str, first: str) -> None:
    """A range gives the rest of the same bytes; with another version in If-Range, or another unit, the whole."""
    address = f"/v1/jobs/{job}/archive"
    whole = harness.http.get(address)
    rest = harness.http.get(address, headers={"Range": f"bytes={first}-", "If-Range": whole.headers["etag"]})
    assert (rest.status_code, rest.content) == (206, whole.content[int(first) :])
    assert rest.headers["content-range"] == f"bytes {first}-{len(whole.content) - 1}/{len(whole.content)}"
    for headers in ({"Range": f"bytes={first}-", "If-Range": '"other"'}, {"Range": f"lines={first}-"}):
        assert harness.http.get(address, headers=headers).status_code == 200
    assert harness.http.get(address, headers={"Range": "bytes=99999999-"}).status_code == 416


def test_who_gets_no_archive(harness: ServiceHarness, tmp_path: Path) -> None:
    """A job that has not ended answers 409, one without files 404, and another user's private job does not exist."""
    waiting: str = harness.submit()["id"]
    refused = harness.http.get(f"/v1/jobs/{waiting}/archive")
    assert (refused.status_code, "is queued, and its files still change" in refused.json()["detail"]) == (409, True)
    assert harness.http.get(f"/v1/jobs/{waiting}/checksums").status_code == 409
    harness.http.post(f"/v1/jobs/{waiting}/cancel")
    assert harness.http.get(f"/v1/jobs/{waiting}/archive").status_code == 404
    other = ServiceHarness(tmp_path)
    owner, stranger = (other.service.tokens.create(name, "user") for name in ("ann", "bob"))
    job = other.submit(headers={"Authorization": f"Bearer {owner}"})["id"]
    for route in ("archive", "checksums"):
        answer = other.http.get(f"/v1/jobs/{job}/{route}", headers={"Authorization": f"Bearer {stranger}"})
        assert answer.status_code == 404


def test_a_file_that_goes_away_ends_the_stream(tmp_path: Path) -> None:
    """A file that is deleted, cut or replaced by a link meanwhile breaks the archive off; no other bytes come."""
    path = tmp_path / "model.safetensors"

    def begun() -> Iterator[bytes]:
        path.unlink(missing_ok=True)
        path.write_bytes(b"x" * 600_000)
        stream = TarStream([Member("model.safetensors", 600_000, path)], time=0).read()
        next(stream)
        return stream

    (tmp_path / "secret").write_bytes(b"s" * 600_000)
    for change in (path.unlink, lambda: path.write_bytes(b"short"), lambda: (path.unlink(), path.symlink_to("secret"))):
        stream = begun()
        change()
        with pytest.raises(FileChanged):
            list(stream)


def test_a_broken_archive_is_not_complete(harness: ServiceHarness, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file changes after the answer has begun, fewer bytes come than were announced."""

    def changed(_: Member, start: int) -> Iterator[bytes]:
        yield b""
        raise FileChanged("gone")

    monkeypatch.setattr(Member, "read", changed)
    answer = harness.http.get(f"/v1/jobs/{job}/archive")
    assert len(answer.content) < int(answer.headers["content-length"])


def test_the_page_offers_the_archive(harness: ServiceHarness, job: str) -> None:
    """The page of an ended job with files has the button, and names both sizes."""
    page = harness.http.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text
    assert f'href="/v1/jobs/{job}/archive" download' in page
    assert f"/v1/jobs/{job}/archive?part=model" in page
