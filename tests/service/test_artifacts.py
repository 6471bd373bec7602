"""Jobs on nodes that share no folder with the service: their files go through an artefact store."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.ray_cluster import Node
from helpers.service import YAML, ServiceHarness, recipe
from helpers.stored_service import Setting, make

from llmprune.service.artifacts.manifest import local_manifest
from llmprune.service.artifacts.parts import Use
from llmprune.service.supervisor.cleanup import clean_up, measure_jobs, stored_bytes, used_bytes
from llmprune.service.supervisor.supervisor import Supervisor


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a prefix on a simulated S3 server, which answers real HTTP requests."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret of the store")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket/prefix"
    server.stop()


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """A service whose store is a folder."""
    yield from make(tmp_path, f"file://{tmp_path / 'store'}", monkeypatch)


@pytest.fixture
def on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str) -> Iterator[Setting]:
    """A service whose store is a bucket."""
    yield from make(tmp_path, s3, monkeypatch)


def test_a_lost_node_and_a_store_on_s3(on_s3: Setting) -> None:
    """A job continues on another node from its last layers; its files are served, in ranges too, and then removed."""
    setting, harness, cluster = on_s3, on_s3.harness, on_s3.cluster
    job = setting.submit(layers=4, pause=0.7, say="hello")
    setting.wait(lambda: len(setting.layers(job)) >= 2)
    before = setting.layers(job)
    cluster.kill(cluster.nodes[0])
    ended = setting.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 2), ended["error"]
    assert cluster.node_of(job) is cluster.nodes[1]
    after = setting.layers(job)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    http = harness.http
    assert http.get(f"/v1/jobs/{job}/log").text == "hello\nhello\n"
    assert http.get(f"/v1/jobs/{job}/report").json()["mean_retention"] == 0.9
    name = "model/model.safetensors"
    listed = {file["name"]: file["bytes"] for file in http.get(f"/v1/jobs/{job}/artifacts").json()}
    assert (listed[name], "model.partial/layer-0" in listed, "report.json" in listed) == (2048, False, True)
    assert not (harness.run_folder(job) / name).exists()
    whole = http.get(f"/v1/jobs/{job}/artifacts/{name}")
    part = http.get(f"/v1/jobs/{job}/artifacts/{name}", headers={"Range": "bytes=2000-"})
    assert (whole.status_code, len(whole.content), part.status_code) == (200, 2048, 206)
    assert part.content == whole.content[2000:]
    assert part.headers["Content-Range"] == "bytes 2000-2047/2048"
    behind = http.get(f"/v1/jobs/{job}/artifacts/{name}", headers={"Range": "bytes=2048-"})
    assert behind.status_code == 416
    digest = hashlib.sha256(whole.content).hexdigest()
    assert http.get(f"/v1/jobs/{job}/checksums", params={"name": name}).json() == {name: digest}
    with tarfile.open(fileobj=io.BytesIO(http.get(f"/v1/jobs/{job}/archive").content)) as archive:
        packed = archive.extractfile(name)
        assert packed is not None
        assert packed.read() == whole.content
    seen = (harness.run_folder(job) / "arguments.json").read_text()
    assert json.loads(seen)["environment"]["AWS_SECRET_ACCESS_KEY"] is None
    sent = json.dumps([one.body for one in cluster.jobs.values()])
    assert "secret of the store" not in sent + seen
    assert http.delete(f"/v1/jobs/{job}").status_code == 204
    harness.supervisor = Supervisor(harness.settings)  # its first round cleans up
    setting.wait(lambda: not setting.store.keys(f"{job}/"))


def test_a_job_that_loses_every_node_fails(shared: Setting) -> None:
    """Losses without progress are counted; the fifth fails the job with the nodes' names; a retry counts anew."""
    shared.cluster.nodes = [Node(shared.cluster.nodes[0].folder.with_name(f"node-{number}")) for number in range(6)]
    job = shared.submit(pause=30)
    for one in shared.cluster.nodes[:5]:
        shared.wait(lambda one=one: shared.cluster.node_of(job) is one)  # type: ignore[misc]
        shared.cluster.kill(one)
    ended = shared.until_ended(job)
    assert "lost 5 times in a row without progress in between (node-0, node-1, node-2 and 2 more)" in ended["error"]
    assert shared.harness.http.post(f"/v1/jobs/{job}/retry").status_code == 200
    shared.wait(lambda: shared.cluster.node_of(job) is shared.cluster.nodes[5])
    shared.harness.http.post(f"/v1/jobs/{job}/cancel")
    shared.cluster.kill(shared.cluster.nodes[5])
    assert shared.until_ended(job)["state"] == "cancelled"


def test_gpus_that_no_node_has(shared: Setting) -> None:
    """Too many GPUs are refused with the largest node's number; a job whose node went away blocks no other."""
    shared.harness.supervisor.round()
    assert "the largest node of the cluster has 2; ask for fewer" in refused(shared, gpus=3)
    grown = shared.harness.settings.model_copy(update={"ray_node_gpus": 8})
    object.__setattr__(shared.harness.service, "settings", grown)
    assert "the largest node of the cluster has 8; ask for fewer" in refused(shared, gpus=9)
    shared.cluster.kill(shared.cluster.nodes[0])
    shared.harness.supervisor = Supervisor(shared.harness.settings)
    waits, runs = shared.submit(2), shared.submit(n=1)
    assert shared.until_ended(runs)["state"] == "succeeded"
    assert shared.harness.job(waits)["state"] == "queued"
    assert shared.harness.job(waits)["step"] == "waits for a node with 2 GPUs; the largest has 1"


def test_a_hub_token_is_not_sent_to_the_nodes(shared: Setting) -> None:
    """A job with a hub token of its own is refused, at submission and at a retry."""
    assert "hub tokens are not sent to machines without" in refused(shared, headers={"X-Hub-Token": "hf_of_a_user"})
    job = shared.submit(exit=1)
    assert shared.until_ended(job)["state"] == "failed"
    again = shared.harness.http.post(f"/v1/jobs/{job}/retry", headers={"X-Hub-Token": "hf_of_a_user"})
    assert (again.status_code, "hub tokens are not sent" in again.text) == (422, True)
    assert not list(shared.harness.settings.folder(job).rglob("hub-token"))


def test_a_store_that_is_away(shared: Setting, tmp_path: Path) -> None:
    """Jobs wait while the store is away, and a running one keeps its files until it is back."""
    store = tmp_path / "store"
    store.write_text("a file where the folder was")
    job = shared.submit(layers=3, pause=0.6)
    for _ in range(5):
        shared.harness.supervisor.round()
        time.sleep(0.05)
    assert (shared.harness.job(job)["state"], shared.harness.job(job)["attempts"]) == ("queued", 0)
    store.unlink()
    shared.wait(lambda: shared.harness.job(job)["done"])
    store.rename(tmp_path / "aside")
    store.write_text("a file where the folder was")
    shared.wait(lambda: shared.harness.job(job)["step"] == "waiting for the artefact store")
    store.unlink()
    (tmp_path / "aside").rename(store)
    assert shared.until_ended(job)["state"] == "succeeded"
    assert len(shared.layers(job)) == 3


def test_the_clean_up_and_a_push_of_a_stored_model(shared: Setting) -> None:
    """A push fetches the model first; the quota counts the store, whose models the clean-up deletes."""
    harness = shared.harness
    job = shared.submit()
    assert shared.until_ended(job)["state"] == "succeeded"
    push = harness.http.post(f"/v1/jobs/{job}/push", json={"repo_id": "o/m"}, headers={"X-Hub-Token": "hf_push"})
    assert push.status_code == 201, push.text
    assert shared.until_ended(push.json()["id"])["state"] == "succeeded"
    harness.supervisor.round()
    assert not list(harness.run_folder(job).glob("model"))
    folder = harness.settings.folder(job)
    assert stored_bytes(folder) > 2048
    measure_jobs(harness.settings, harness.service.jobs)
    assert disk_of(harness, job) == stored_bytes(folder) + used_bytes(folder)
    small = harness.settings.model_copy(update={"disk_quota": 1})
    clean_up(small, harness.service.jobs)
    assert harness.job(job)["cleaned"]
    left = shared.manifest(job)
    assert left is not None
    assert "report.json" in {file.name for file in left.files}
    assert not [file for file in left.files if file.name.startswith("model")]
    assert left == local_manifest(harness.settings.folder(job))
    assert {*left.objects} == {*shared.store.keys(f"{job}/objects/")}


def test_work_on_a_model_whose_base_another_node_made(shared: Setting) -> None:
    """The base is fetched to each machine, with the times of its files, by which runs know it, and with its report."""
    first = shared.submit(config=1)
    assert shared.until_ended(first)["state"] == "succeeded"
    shared.cluster.nodes.reverse()
    text = recipe(config=1, n=2, more_pause=0.5).replace("org/model", f"job://{first}")
    job = shared.harness.submit(text, launcher="ray")["id"]
    assert shared.until_ended(job)["state"] == "succeeded"
    work = {"work": {"kind": "evaluate", "limit": 90}, "launcher": "local"}
    more = shared.harness.http.post(f"/v1/jobs/{job}/follow-ups", json=work).json()["id"]
    model = shared.harness.run_folder(first) / "model"
    shared.wait((model / "model.safetensors").is_file)
    manifest = local_manifest(shared.harness.settings.folder(first))
    assert manifest is not None
    times = {file.name: file.modified for file in manifest.files}
    assert {f"model/{path.name}": path.stat().st_mtime_ns for path in model.iterdir()}.items() <= times.items()
    assert shared.until_ended(more)["state"] == "succeeded"
    assert shared.harness.http.post(f"/v1/jobs/{job}/reevaluate?limit=300").status_code == 200
    assert shared.until_ended(job)["state"] == "succeeded"
    said = [one.body["entrypoint"] for name, one in shared.cluster.jobs.items() if job in name]
    assert f"--base={model.absolute()}" in said[-1], "the node puts its own folder in place of it"
    assert Use(first, "model").includes("report.json")


def disk_of(harness: ServiceHarness, job: str) -> int:
    """Return the bytes of a job that count for its owner's quota."""
    return int(harness.service.database.read("SELECT bytes FROM job_disk WHERE job = ?", (job,))[0]["bytes"])


def refused(setting: Setting, headers: dict[str, str] | None = None, **params: Any) -> str:
    """Return why a submission for the cluster is refused."""
    answer = setting.harness.http.post(
        "/v1/jobs", content=recipe(), params={"launcher": "ray", **params}, headers=YAML | (headers or {})
    )
    assert answer.status_code == 422
    return answer.text
