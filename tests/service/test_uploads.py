"""Uploads of run folders: complete, interrupted, damaged, too large, hostile, and those of others."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from helpers.finished import HEADER, WEIGHTS, report_json, write_run
from helpers.service import BASE, ServiceHarness

from llmprune.common.errors import OutputError, RecipeError
from llmprune.service.client import run_files as run_files_module
from llmprune.service.client.run_files import run_files
from llmprune.service.client.sync.client import Client
from llmprune.service.jobs.library.model_rows import kept_models
from llmprune.service.jobs.uploads.files import UploadFile, check_files, check_model, is_run_file
from llmprune.service.jobs.uploads.uploads import KEEP_SECONDS, MAX_OPEN, Uploads
from llmprune.service.users.quotas import set_own_quotas

PAGE = {"Accept": "text/html"}


class Line(httpx.BaseTransport):
    """A connection to a service in this process. ``cut``: bodies that are lost, by the number of the PUT request."""

    def __init__(
        self, harness: ServiceHarness, cut: tuple[int, ...] = (), headers: dict[str, str] | None = None
    ) -> None:
        self.harness, self.cut, self.headers, self.puts = harness, cut, headers or {}, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Pass a request on, and lose the answer where asked."""
        body = request.read()
        self.puts += request.method == "PUT"
        answer = self.harness.http.request(
            request.method, str(request.url), headers=dict(request.headers) | self.headers, content=body
        )
        if request.method == "PUT" and self.puts in self.cut:
            raise httpx.ReadError("cut")
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service without tokens."""
    return ServiceHarness(tmp_path_factory.mktemp("uploads"), rate=1e6, burst=10**6)


def client(harness: ServiceHarness, **line: Any) -> Client:
    """Return a client of a service in this process."""
    return Client(BASE, transport=Line(harness, **line), pause=lambda _: None)


def files_of(folder: Path) -> list[dict[str, Any]]:
    """Return the files of a run folder as an upload begins with them."""
    with run_files(folder) as files:
        return [file.described() for file in files]


def begin(harness: ServiceHarness, folder: Path, **changes: Any) -> Any:
    """Begin an upload and return the answer."""
    return harness.http.post("/v1/models/uploads", json={"files": files_of(folder)} | changes)


def send(harness: ServiceHarness, upload: str, name: str, content: bytes, offset: int = 0) -> httpx.Response:
    """Send a part of a file."""
    return harness.http.put(f"/v1/models/uploads/{upload}/files/{name}", params={"offset": offset}, content=content)


def test_an_uploaded_run_is_a_model(harness: ServiceHarness, tmp_path: Path) -> None:
    """It has the figures of its report, labels, a page made anew, and is neither run nor cleaned nor pushed here."""
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("<form action=//evil>")
    (run / "model.partial").mkdir()
    (run / "model.partial" / "x.safetensors").write_bytes(b"half")
    seen: list[tuple[int, int]] = []
    job = (
        client(harness)
        .upload(run, name="mine", tags=["lab"], notes="from the lab", progress=lambda *at: seen.append(at))
        .refresh()
    )
    assert (job.state, job.attempts, job.uploaded, job.name) == ("succeeded", 0, True, "mine")
    assert seen[-1][0] == seen[-1][1] > 0
    assert client(harness).upload(run, name="mine", tags=["lab"], notes="from the lab").id == job.id
    model = harness.http.get(f"/v1/models/{job.id}").json()
    assert (model["tags"], model["notes"], model["figures"]["retention"]) == (["lab"], "from the lab", 0.9483)
    report = harness.http.get(f"/v1/jobs/{job.id}/report.html").text
    assert ("SmolLM2" in report, "<form" in report) == (True, False)
    names = {file["name"] for file in harness.http.get(f"/v1/jobs/{job.id}/artifacts").json()}
    assert names == {"report.json", "report.html", "model/config.json", "model/model.safetensors"}
    for verb in ("reevaluate", "retry"):
        assert harness.http.post(f"/v1/jobs/{job.id}/{verb}").status_code == 409
    push = harness.http.post(f"/v1/jobs/{job.id}/push", json={"repo_id": "a/b"}, headers={"X-Hub-Token": "hf_a"})
    assert push.status_code == 409
    asked = harness.http.post(f"/v1/jobs/{job.id}/follow-ups", json={"work": {"kind": "bench"}})
    assert (asked.status_code, "was uploaded" in asked.text) == (409, True)
    assert job.id in kept_models(harness.service.database)
    page = harness.http.get(f"/jobs/{job.id}", headers=PAGE).text
    assert ("uploaded by local" in page, f"/jobs/{job.id}/push" in page) == (True, False)
    harness.supervisor.round()
    assert harness.job(job.id)["state"] == "succeeded"


def test_an_interrupted_upload_continues(
    harness: ServiceHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost answers are found out, a second upload goes on where the first stopped, and an archive is the same run."""
    monkeypatch.setattr(run_files_module, "PART_BYTES", 10_000)
    run = write_run(tmp_path / "run", report_json(created="interrupted"))
    upload = begin(harness, run).json()["id"]
    content = (run / "report.json").read_bytes()
    assert send(harness, upload, "report.json", content[:5000]).json()["received"] == 5000
    for offset, status in ((0, 409), (9000, 409)):
        assert send(harness, upload, "report.json", b"x", offset).status_code == status
    with tarfile.open(tmp_path / "run.tar", "w") as archive:
        archive.add(run, ".")
    job = client(harness, cut=(1, 2, 4)).upload(tmp_path / "run.tar")
    assert job.id == upload
    assert (harness.run_folder(upload) / "report.json").read_bytes() == content
    assert (harness.run_folder(upload) / "model" / "model.safetensors").read_bytes() == WEIGHTS
    assert harness.http.post(f"/v1/models/uploads/{upload}/finish").json()["id"] == upload
    assert harness.http.get(f"/v1/models/uploads/{upload}").status_code == 404


def test_damaged_files_are_sent_again_and_an_incomplete_upload_is_no_model(
    harness: ServiceHarness, tmp_path: Path
) -> None:
    """A file of another hash or length is refused and dropped; until all are there nothing can be read."""
    run = write_run(tmp_path / "run", report_json(created="damaged"))
    upload = begin(harness, run).json()["id"]
    good = (run / "model" / "config.json").read_bytes()
    assert send(harness, upload, "model/config.json", b"[]").status_code == 422
    assert send(harness, upload, "model/config.json", good + b"!").status_code == 422
    assert send(harness, upload, "model/other.json", good).status_code == 404
    assert send(harness, upload, "..%2F..%2Frecipe.yaml", good).status_code == 404
    assert send(harness, upload, "model/config.json", good).json()["received"] == 2
    assert send(harness, upload, "model/config.json", good).status_code == 409
    answer = harness.http.post(f"/v1/models/uploads/{upload}/finish")
    assert (answer.status_code, "send the rest" in answer.json()["detail"]) == (409, True)
    assert harness.http.get(f"/v1/jobs/{upload}").status_code == 404
    assert harness.http.get(f"/v1/jobs/{upload}/artifacts/model/config.json").status_code == 404
    assert harness.http.delete(f"/v1/models/uploads/{upload}").status_code == 204
    assert not harness.settings.folder(upload).exists()


def test_a_report_that_cannot_be_read_is_refused(harness: ServiceHarness, tmp_path: Path) -> None:
    """A report of another schema, or with a token in its recipe, and weights that are cut off make no model."""
    for number, (changes, said) in enumerate(
        (
            ({"schema_version": 1}, "has schema 1"),
            ({"layers": "none"}, "cannot be read"),
            ({"recipe_text": "# hf_" + "a" * 34}, "token"),
            ({"recipe_text": "#" * 40_000}, "has more than"),
        )
    ):
        run = write_run(tmp_path / str(number), report_json(**changes))
        with pytest.raises(RecipeError, match=said) as refused:
            client(harness).upload(run)
        assert str(tmp_path) not in str(refused.value)
        upload = begin(harness, run).json()["id"]
        assert harness.http.delete(f"/v1/models/uploads/{upload}").status_code == 204


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (WEIGHTS[:-1], "its header says"),
        (WEIGHTS + b"x", "its header says"),
        (b"\x80\x04pickle", "no safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{}", "no safetensors file"),
        (len(HEADER).to_bytes(8, "little") + b"[" * len(HEADER), "no safetensors file"),
        (b"", "no safetensors file"),
    ],
)
def test_weights_are_checked_by_their_headers(tmp_path: Path, weights: bytes, said: str) -> None:
    """Weights that are cut off, too long or of another format are refused, without reading them."""
    run = write_run(tmp_path)
    check_model(run / "model")
    (run / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(RecipeError, match=said):
        check_model(run / "model")


def test_every_shard_of_the_index_is_there(tmp_path: Path) -> None:
    """A missing shard is named."""
    run = write_run(tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (run / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match=r"model-2\.safetensors missing"):
        check_model(run / "model")
    for wrong in ("[]", '{"weight_map": {"a": ["b"]}}'):
        (run / "model" / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(RecipeError, match="missing, which"):
            check_model(run / "model")


@pytest.mark.parametrize(
    "name",
    [
        "../x.json", "/etc/passwd", "model/../../x.safetensors", "model//x", "model/", "", "model\\x", "C:x", ".lock",
        "model/.hidden", "model.partial/x", "model/x.partial", "report.html", "model/x.html", "model/pytorch_model.bin",
        "model/x.PT", "secrets/x.json", "x.json", "model/a/b/c/d", "model/ü.json", "model/x\n", "m" * 300, "~/x",
        "rounds/1/report.json", "dense.partial",
    ],
)  # fmt: skip
def test_only_files_of_a_run_are_taken(name: str) -> None:
    """Names outside of the folder, hidden and partial files, pages, pickles and unknown files are refused."""
    assert not is_run_file(name)


def test_a_list_of_files_is_checked_whole() -> None:
    """Files that are missing, listed twice, or a file and a folder at once, are all named."""
    digest = hashlib.sha256(b"").hexdigest()
    names = ("report.json", "report.json", "model/a", "model/a/b", "model/tokenizer_config.json")
    sizes = {"model/tokenizer_config.json": 10**9}
    files = tuple(UploadFile(name=name, bytes=sizes.get(name, 1), sha256=digest) for name in names)
    with pytest.raises(RecipeError) as refused:
        check_files(files)
    for said in (
        "listed twice",
        "'model/a' is a file and a folder",
        "model/config.json is missing",
        "no safetensors",
        "at most",
    ):
        assert said in str(refused.value)


def test_uploads_are_private_limited_and_do_not_stay(tmp_path: Path) -> None:
    """Others do not find an upload; size and number are limited; one that gets nothing for a day is deleted."""
    harness = ServiceHarness(tmp_path / "service", upload_limit=60_000, rate=1e6, burst=10**6)
    tokens = {name: harness.service.tokens.create(name, "user") for name in ("ann", "bob")}
    headers = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}
    run = write_run(tmp_path / "run")
    body = {"files": files_of(run)}
    made = [
        harness.http.post("/v1/models/uploads", json=body | {"name": f"{number}"}, headers=headers["ann"])
        for number in range(MAX_OPEN + 1)
    ]
    assert [answer.status_code for answer in made] == [201] * MAX_OPEN + [409]
    upload = made[0].json()["id"]
    for method, path in (("GET", ""), ("POST", "/finish"), ("DELETE", ""), ("PUT", "/files/report.json")):
        address = f"/v1/models/uploads/{upload}{path}"
        assert harness.http.request(method, address, headers=headers["bob"]).status_code == 404
    (run / "model" / "more.safetensors").write_bytes(bytes(60_000))
    large = harness.http.post("/v1/models/uploads", json={"files": files_of(run)}, headers=headers["bob"])
    assert (large.status_code, "at most 60" in large.text) == (422, True)
    set_own_quotas(harness.service.database, "bob", quotas={"disk": 100})
    over = harness.http.post("/v1/models/uploads", json=body, headers=headers["bob"])
    assert (over.status_code, "delete jobs or models, or ask an admin" in over.text) == (429, True)
    with harness.service.database.write() as connection:
        connection.execute("UPDATE uploads SET changed = changed - ?", (KEEP_SECONDS + 1,))
    Uploads(harness.service.database, harness.settings).remove_stale()
    assert harness.http.get(f"/v1/models/uploads/{upload}", headers=headers["ann"]).status_code == 404
    assert list((harness.settings.data_dir / "jobs").iterdir()) == []


def test_what_is_no_run_is_refused_at_home(tmp_path: Path, harness: ServiceHarness) -> None:
    """A folder without a report, and a file that is no archive, are refused before anything is sent."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no archive")
    for name, said in (("empty", "no report.json"), ("text", "no run folder"), ("absent", "no run folder")):
        with pytest.raises(OutputError, match=said):
            client(harness).upload(tmp_path / name)
    write_run(tmp_path / "run")
    (tmp_path / "run" / "model" / "link.safetensors").symlink_to("/etc/passwd")
    assert "model/link.safetensors" not in {file["name"] for file in files_of(tmp_path / "run")}
