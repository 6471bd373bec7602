"""The loss of a Ray node in the middle of a real run, with a shared data folder and with an artefact store.

The store is moto, which answers real HTTP requests as S3 does, though it simulates it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import record, write_recipe
from helpers.ray_nodes import Cluster
from helpers.service import ServiceHarness
from safetensors.torch import save_file
from service_kills import results

from llmprune.service.artifacts.manifest import fetch, newest_manifest
from llmprune.service.artifacts.publisher import Publisher
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.jobs.job import ENDED
from llmprune.service.settings import Settings
from llmprune.testing import tiny_model

LAYERS = 16
KILLED_AFTER = 6  # layers of pass 2


def measure_nodes(folder: Path, arguments: argparse.Namespace) -> None:
    """Kill the node of a run, by both ways of sharing its files, and compare the results with an undisturbed run."""
    del arguments
    recipe = _recipe(folder)
    undisturbed = ServiceHarness(folder / "undisturbed", **_real(folder))
    job = _submit(undisturbed, recipe, launcher="local")
    begin = time.monotonic()
    _until(undisturbed, job, lambda found: found["state"] in ENDED)
    plain = {"seconds": round(time.monotonic() - begin, 1), "digest": results(undisturbed.run_folder(job))}
    with _s3() as url:
        ways = {"shared folder": None, "object store": url}
        lost = {way: _lose_a_node(folder / way.replace(" ", "-"), recipe, url=place) for way, place in ways.items()}
        artefacts = {
            name: _artefact_seconds(folder, undisturbed.run_folder(job), store=ArtifactStore(place))
            for name, place in {"object store": f"{url}-cost", "folder": f"file://{folder / 'cost'}"}.items()
        }
    for way, found in lost.items():
        found["identical"] = found.pop("digest") == plain["digest"]
        print(way, found)
    figures = {"layers": LAYERS, "undisturbed_seconds": plain["seconds"], "lost": lost, "artefacts": artefacts}
    record("service-nodes", figures)


def _lose_a_node(folder: Path, recipe: str, *, url: str | None) -> dict[str, Any]:
    """Run a job on a node, kill the node, and return how long it took to continue on the other one."""
    short = Path("/tmp") / f"ray-{os.getpid()}"  # sockets lie there
    short.mkdir()
    cluster = Cluster(short)
    try:
        assert cluster.start(gpus=1, LLMPRUNE_NODE_FOLDER=str(folder / "node-1")), cluster.said()
        assert cluster.add_node(gpus=1, LLMPRUNE_NODE_FOLDER=str(folder / "node-2")), cluster.said()
        harness = ServiceHarness(folder, ray=cluster.address, artifacts=url, **_real(folder.parent))
        job = _submit(harness, recipe, launcher="ray", gpus=1)
        progressed = _until(harness, job, lambda one: _in_pass_2(one) and one["done"] >= KILLED_AFTER)
        name = f"{cluster.address}/api/jobs/llmprune-{job}-1"
        cluster.kill(_driver_node(name))
        killed = time.monotonic()
        _until(harness, job, lambda one: one["attempts"] == 2 or one["state"] == "queued")
        detected = time.monotonic() - killed
        continued = _until(harness, job, lambda one: one["attempts"] == 2 and _in_pass_2(one))
        seconds = time.monotonic() - killed
        ended = _until(harness, job, lambda one: one["state"] in ENDED)
        assert ended["state"] == "succeeded", ended["error"]
        return {
            "killed_after_layers": progressed["done"],
            "continued_after_layers": progressed["total"] - continued["total"],  # it counts those that are left
            "seconds_to_detection": round(detected, 1),
            "seconds_to_continuation": round(seconds, 1),
            "attempts": ended["attempts"],
            "digest": _digest(harness, job, folder=folder),
        }
    finally:
        cluster.stop()
        shutil.rmtree(short, ignore_errors=True)


def _artefact_seconds(folder: Path, run_folder: Path, *, store: ArtifactStore) -> dict[str, Any]:
    """Seconds and bytes of a first publication of a finished run, of one without changes, and of the way back."""
    copy = folder / "published"
    shutil.copytree(run_folder, copy / "run")
    publisher = Publisher(store, "0123456789ab", 1, copy)
    first = _seconds(publisher.publish)
    (copy / "run" / "run.json").touch()
    again = _seconds(publisher.publish)
    assert publisher.last is not None, "published"
    manifest = publisher.last
    back = _seconds(lambda: fetch(store, manifest, folder=copy / "back"))
    shutil.rmtree(copy)
    return {
        "files": len(manifest.files), "bytes": manifest.bytes, "first_seconds": first, "unchanged_seconds": again,
        "fetch_seconds": back,
    }  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return round(time.monotonic() - begin, 3)


def _digest(harness: ServiceHarness, job: str, *, folder: Path) -> str:
    """Digest of a job's result, fetched from the store where there is one."""
    if harness.settings.artifacts is None:
        return results(harness.run_folder(job))
    store = ArtifactStore(harness.settings.artifacts)
    manifest = newest_manifest(store, job)
    assert manifest is not None, "published"
    assert not fetch(store, manifest, folder=folder / "fetched")
    return results(folder / "fetched")


def _driver_node(address: str) -> str:
    import httpx2 as httpx

    return str(httpx.get(address, timeout=30).json()["driver_node_id"])


def _in_pass_2(job: dict[str, Any]) -> bool:
    return str(job["step"]).startswith("pass 2") and job["done"] is not None


def _until(harness: ServiceHarness, job: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    return harness.until(job, reached, 900, pause=0.2)


def _submit(harness: ServiceHarness, recipe: str, **how: Any) -> str:
    return str(harness.submit(recipe, **how)["id"])


def _real(folder: Path) -> dict[str, Any]:
    """Settings for real runs."""
    return {"command": Settings.model_fields["command"].default, "allow_roots": (folder,), "memory_limit": None}


def _recipe(folder: Path) -> str:
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 512}
    tiny_model("llama", **sizes).save_pretrained(folder / "base")
    windows = torch.randint(128, (64, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": windows}, folder / "tokens.safetensors")
    calibration = {"tokens": str(folder / "tokens.safetensors"), "key": "tokens"}
    sections = {"depth": {"remove": 2}, "width": {"mlp": 0.75}}
    return write_recipe(folder / "recipe.yaml", {"id": str(folder / "base")}, calibration, **sections).read_text()


@contextlib.contextmanager
def _s3() -> Iterator[str]:
    """Run a simulated S3 server, and set the variables by which this machine and the nodes reach it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/runs"
    server.stop()
