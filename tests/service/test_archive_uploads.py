"""Archives that the browser uploads: unpacked while they arrive, refused whole, with nothing left of a refused one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.finished import WEIGHTS, finished, report_json, write_run
from helpers.service import ServiceHarness

from llmprune.service.jobs.uploads import archives as archive_uploads
from llmprune.service.jobs.uploads.uploads import MAX_OPEN, UploadRequest, Uploads
from llmprune.service.users.quotas import set_own_quotas
from llmprune.service.users.tokens import LOCAL
from llmprune.service.web import uploads as route

PAGE, PROGRAM = {"Accept": "text/html"}, {"Accept": "application/json"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service without tokens."""
    return ServiceHarness(tmp_path_factory.mktemp("archives"), rate=1e6, burst=10**6, upload_limit=100_000)


def tar_of(folder: Path, *, format: int = tarfile.PAX_FORMAT, **more: bytes) -> bytes:
    """Return the archive of a folder, and of ``more`` files by their names, where ``_`` stands for a slash."""
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w", format=format) as archive:
        archive.add(folder, ".")
        for name, content in more.items():
            entry = tarfile.TarInfo(name.replace("_", "/"))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return into.getvalue()


def send(harness: ServiceHarness, archive: bytes, headers: dict[str, str] | None = None, **fields: str) -> Any:
    """Send the form as a browser does."""
    return harness.http.post(
        "/models/upload",
        data=fields,
        files={"archive": ("run.tar", archive, "application/x-tar")},
        headers=PROGRAM | (headers or {}),
        follow_redirects=False,
    )


def left(harness: ServiceHarness) -> tuple[list[str], int]:
    """Return the folders of jobs, and the number of uploads under way."""
    folders = sorted(path.name for path in (harness.settings.data_dir / "jobs").iterdir())
    return folders, harness.service.database.read("SELECT count(*) AS n FROM uploads")[0]["n"]


def test_the_download_of_a_service_is_uploaded_again(harness: ServiceHarness) -> None:
    """The archive of a job becomes the same model with labels, once however often it is sent; the page leads to it."""
    job = finished(harness, "mine", report_json(created="first"))
    archive = harness.http.get(f"/v1/jobs/{job}/archive").content
    sent = send(harness, archive, name="again", tags="lab, Code", notes="from elsewhere")
    assert sent.status_code == 201, sent.text
    place = sent.json()["location"]
    made = harness.job(place.removeprefix("/jobs/"))
    assert (made["state"], made["uploaded"], made["name"]) == ("succeeded", True, "again")
    model = harness.http.get(f"/v1/models/{made['id']}").json()
    assert (model["tags"], model["notes"]) == (["code", "lab"], "from elsewhere")
    assert (harness.run_folder(made["id"]) / "model" / "model.safetensors").read_bytes() == WEIGHTS
    before = left(harness)
    assert send(harness, archive, name="again", tags="lab, Code", notes="from elsewhere").json()["location"] == place
    by_form = send(harness, archive, PAGE, name="again", tags="lab, Code", notes="from elsewhere")
    assert (by_form.status_code, by_form.headers["Location"]) == (303, place)
    assert left(harness) == before
    text = harness.http.get("/models", headers=PAGE).text
    assert ('action="/models/upload"' in text, 'data-limit="100000"' in text) == (True, True)
    assert 'action="/models/upload"' in harness.http.get("/models/upload", headers=PAGE).text


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_of_other_tools_are_taken(harness: ServiceHarness, tmp_path: Path, format: int) -> None:
    """Archives of tar have folders, other files and names with ./, which are left out."""
    run = write_run(tmp_path / "run", report_json(created=f"by tar {format}"))
    (run / "notes.doc").write_text("mine")
    (run / "model" / "evil.bin").write_text("pickle")
    (run / "model" / "link.json").symlink_to("/etc/passwd")
    sent = send(harness, tar_of(run, format=format))
    assert sent.status_code == 201, sent.text
    files = harness.http.get(f"/v1{sent.json()['location']}/artifacts").json()
    names = {file["name"] for file in files}
    assert names == {"report.json", "report.html", "model/config.json", "model/model.safetensors"}


def refused() -> Iterator[tuple[str, Any, str]]:
    """Archives that are refused: a name, what is done to a good one, and words of the refusal."""
    yield "text", lambda good: b"no archive" * 200, "no uncompressed tar archive"
    yield "gzip", lambda good: b"\x1f\x8b" + good, "no uncompressed tar archive"
    yield "empty", lambda good: b"", "no uncompressed tar archive"
    yield "zeros", lambda good: bytes(10_240), "report.json is missing"
    yield "cut in a file", lambda good: good[: good.index(b"safetensors") + 700], "damaged or cut off"
    yield "cut behind a file", lambda good: good.rstrip(b"\0")[: len(good) // 512 * 512 - 10_240], "cut off"
    yield "no end", lambda good: good[: good.index(bytes(1024), good.index(b"schema_version")) + 512], "cut off"
    yield "a damaged header", lambda good: b"uztar".join(good.rsplit(b"ustar", 1)), "damaged or cut off"
    yield "more behind it", lambda good: good + b"x", "damaged or cut off"
    yield "above the limit", lambda good: good + bytes(100_000), "at most 100"


@pytest.mark.parametrize(("change", "said"), [pytest.param(*one, id=name) for name, *one in refused()])
def test_a_refused_archive_leaves_nothing(harness: ServiceHarness, tmp_path: Path, change: Any, said: str) -> None:
    """The refusal says why, as a page too, and neither files nor rows are left."""
    before = left(harness)
    archive = change(tar_of(write_run(tmp_path / "run", report_json(created="refused"))))
    answer = send(harness, archive)
    assert (answer.status_code, said in answer.json()["detail"]) == (422, True), answer.text
    shown = send(harness, archive, PAGE)
    assert (shown.status_code, said in shown.text, "<form" in shown.text) == (422, True, True)
    assert left(harness) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model_config.json": b"{}"}, "twice, or as a file and a folder"),
        ({"model_config.json_x": b"{}"}, "twice, or as a file and a folder"),
        ({"cut.json": bytes(30_000)}, "at most 20"),
        ({f"tasks_{number}.json": b"" for number in range(9)}, "too many files"),
        ({"model_a.safetensors": b"short"}, "no safetensors file"),
        ({"quantized_config.json": b"{}", "quantized_a.safetensors": b"short"}, "quantized/a.safetensors is no"),
    ],
)
def test_what_no_run_has_is_refused(
    harness: ServiceHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, bytes], said: str
) -> None:
    """A name that comes twice, large records, too many files and damaged weights are refused."""
    monkeypatch.setattr(archive_uploads, "MAX_FILES", 8)
    monkeypatch.setattr("llmprune.service.jobs.uploads.files.MAX_RECORD", 20_000)
    before = left(harness)
    answer = send(harness, tar_of(write_run(tmp_path / "run"), **more))
    assert (answer.status_code, said in answer.json()["detail"]) == (422, True), answer.text
    assert left(harness) == before


def test_headers_are_never_large_in_memory(harness: ServiceHarness) -> None:
    """A header that announces gigabytes is refused at its first half megabyte."""
    entry = tarfile.TarInfo("report.json")
    entry.type, entry.size = tarfile.XHDTYPE, 50_000_000
    endless, read = io.BytesIO(entry.tobuf() + bytes(4_000_000)), list[int]()

    class Counted:
        def read(self, size: int) -> bytes:
            read.append(len(part := endless.read(size)))
            return part

    uploads = Uploads(harness.service.database, harness.settings)
    with pytest.raises(Exception, match="a header of more than"):
        archive_uploads.receive_archive(Counted(), uploads, request=UploadRequest(files=()), size=9, caller=LOCAL)
    assert sum(read) < 700_000


def test_forms_are_checked(harness: ServiceHarness, tmp_path: Path) -> None:
    """A form without a file, of another kind, with bad tags or with more behind its file is refused."""
    archive = tar_of(write_run(tmp_path / "run"))
    before = left(harness)
    assert "has no archive" in harness.http.post("/models/upload", files={"archive": ("", b"")}, headers=PROGRAM).text
    assert harness.http.post("/models/upload", data={"name": "x"}, headers=PROGRAM).status_code == 415
    assert "a tag has" in send(harness, archive, tags="-").text
    assert "notes" in send(harness, archive, notes="n" * 5000).text
    assert send(harness, archive, notes="n" * 70_000).status_code == 413
    two = [("archive", ("a.tar", archive)), ("archive", ("b.tar", archive))]
    answer = harness.http.post("/models/upload", files=two, headers=PROGRAM)
    assert (answer.status_code, "behind its archive" in answer.text) == (422, True), answer.text
    other = send(harness, archive, {"Origin": "http://evil.example"})
    assert other.status_code == 403
    assert left(harness) == before


def test_an_upload_that_breaks_off_leaves_nothing(
    harness: ServiceHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that ends early or stops is no model; what a killed service was receiving goes when it starts again."""
    archive = tar_of(write_run(tmp_path / "run"))
    form = b'--b\r\nContent-Disposition: form-data; name="archive"; filename="r.tar"\r\n\r\n' + archive[:3000]
    kind = PROGRAM | {"Content-Type": "multipart/form-data; boundary=b"}
    before = left(harness)
    assert "ends within the archive" in harness.http.post("/models/upload", content=form, headers=kind).text
    uploads = Uploads(harness.service.database, harness.settings)
    upload = uploads.begin_archive(UploadRequest(files=()), LOCAL, size=10)
    assert harness.http.get(f"/v1/models/uploads/{upload.id}").status_code == 404
    assert len(left(harness)[0]) == len(before[0]) + 1
    monkeypatch.setattr(route, "_AT_ONCE", 0)
    del harness.app.state.arriving_archives
    assert send(harness, archive).status_code == 429
    del harness.app.state.arriving_archives
    Uploads(harness.service.database, harness.settings).remove_broken()
    assert left(harness) == before


def test_archives_have_the_limits_of_their_owner(tmp_path: Path) -> None:
    """Viewers may not upload; number, disk and quota limits are those of an upload file by file."""
    harness = ServiceHarness(tmp_path / "service", rate=1e6, burst=10**6)
    tokens = {name: harness.service.tokens.create(name, role) for name, role in (("ann", "user"), ("eve", "viewer"))}
    headers = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}
    archive = tar_of(write_run(tmp_path / "run"))
    assert send(harness, archive, headers["eve"]).status_code == 403
    ann = harness.service.tokens.caller(tokens["ann"])
    assert ann is not None
    uploads = Uploads(harness.service.database, harness.settings)
    for _ in range(MAX_OPEN):
        uploads.begin_archive(UploadRequest(files=()), ann, size=10)
    assert (answer := send(harness, archive, headers["ann"])).status_code == 409, answer.text
    uploads.remove_broken()
    set_own_quotas(harness.service.database, "ann", quotas={"disk": 100})
    assert (answer := send(harness, archive, headers["ann"])).status_code == 429, answer.text
    assert left(harness) == ([], 0)
