"""Credentials of the operator: none reaches a job or the planner unless it is lent."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import huggingface_hub
import pytest
from helpers.service import RECIPE, ServiceHarness, recipe

from llmprune.service.environment import inherited
from llmprune.service.supervisor.launchers.base import Launch
from llmprune.service.supervisor.launchers.ray import Ray

MINE = "of-the-operator"
HUB = {
    **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME"), MINE),
    **dict.fromkeys(("HF_OIDC_RESOURCE", "HF_OIDC_ID_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"), MINE),
    **dict.fromkeys(("HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HUGGINGFACE_ASSETS_CACHE"), MINE),
    **dict.fromkeys(("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "TRANSFORMERS_CACHE"), MINE),
    **dict.fromkeys(("HF_DATASETS_DOWNLOADED_DATASETS_PATH", "HF_DATASETS_EXTRACTED_DATASETS_PATH"), MINE),
    **dict.fromkeys(("PYTORCH_TRANSFORMERS_CACHE", "LM_HARNESS_CACHE_PATH", "HUGGINGFACE_CO_STAGING"), MINE),
}
OTHERS = {
    **dict.fromkeys(("LLMPRUNE_TOKEN", "RAY_AUTH_TOKEN", "GITHUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"), MINE),
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AZURE_CLIENT_ID"), MINE),
    **dict.fromkeys(("GOOGLE_APPLICATION_CREDENTIALS", "DB_PASSWORD", "MYSQL_PWD", "PGPASSFILE", "SENTRY_DSN"), MINE),
    **dict.fromkeys(("SSH_AUTH_SOCK", "GIT_ASKPASS", "ADO_PAT", "FSSPEC_S3_CONFIG", "my_secret", "STRIPEAPIKEY"), MINE),
    "DATABASE_URL": f"postgres://ann:{MINE}@db/x",
    "NOTES": f"hf_{'AbCdEfGhIj' * 3} {MINE}",
}
HARMLESS = {
    "PATH": "/bin", "PWD": "/", "OLDPWD": "/", "HOME": "/root", "TOKENIZERS_PARALLELISM": "false", "LANG": "C",
    "CUDA_HOME": "/cuda", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "NCCL_SOCKET_IFNAME": "eth0", "MASTER_ADDR": "node",
    "PYTORCH_CUDA_ALLOC_CONF": "x", "LD_LIBRARY_PATH": "/lib", "OMP_NUM_THREADS": "1", "TORCH_HOME": "/t",
    "HTTPS_PROXY": "http://ann:pw@proxy:1", "no_proxy": "x", "HF_ENDPOINT": "https://ann:pw@mirror", "TMPDIR": "/tmp",
    "HF_HUB_OFFLINE": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "9", "HF_HUB_DISABLE_XET": "1", "SSL_CERT_FILE": "/c.pem",
}  # fmt: skip
STUB = '#!/bin/sh\nenv > "$(dirname "$LLMPRUNE_PROGRESS")/environment"\n'


def test_the_rule_by_names() -> None:
    """What looks like a credential is removed by its kind; what torch, CUDA, NCCL, proxies and the hub need stays."""
    assert inherited(HUB | OTHERS | HARMLESS, keep_hub=False) == HARMLESS
    assert inherited(HUB | OTHERS | HARMLESS, keep_hub=True) == HARMLESS | HUB


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is started by somebody who has all of it in the environment."""
    for name, value in (HUB | OTHERS).items():
        monkeypatch.setenv(name, value)
    # A service's process never loads the hub client; this one may have, and it would look for an OIDC server.
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def stub(folder: Path) -> str:
    """A program that stands for Python in a launcher's command, and only notes its environment."""
    path = folder / "stub"
    path.write_text(STUB)
    path.chmod(0o755)
    return str(path)


def noted(harness: ServiceHarness, job: str) -> dict[str, str]:
    """The environment that a job has run in."""
    lines = (harness.settings.folder(job) / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_a_job_sees_nothing_of_the_operators(tmp_path: Path, launcher: str) -> None:
    """Neither tokens nor caches nor other credentials; its HF_HOME is the service's, or its own with its own token."""
    harness = ServiceHarness(tmp_path, command=(stub(tmp_path), "x"))
    plain = harness.submit(launcher=launcher)["id"]
    own = harness.submit(recipe(n=1), {"X-Hub-Token": "hf_x"}, launcher=launcher)["id"]
    for job, home in ((plain, harness.settings.hub_home), (own, harness.settings.folder(own) / "hub-home")):
        assert harness.until_ended(job)["state"] == "succeeded"
        seen = noted(harness, job)
        assert [name for name, value in seen.items() if MINE in value] == []
        assert seen["HF_HOME"] == str(home.absolute())
        assert (seen["NETRC"], seen["HF_ENDPOINT"]) == (os.devnull, os.environ["HF_ENDPOINT"])
    assert noted(harness, own)["HF_TOKEN_PATH"] == str(harness.settings.folder(own).absolute() / "hub-token")
    assert "HF_TOKEN_PATH" not in noted(harness, plain)


@pytest.mark.usefixtures("planted")
def test_only_hub_access_is_lent(tmp_path: Path) -> None:
    """With --lend-hub-token jobs have the operator's hub variables and no other credential; an own one comes first."""
    harness = ServiceHarness(tmp_path, command=(stub(tmp_path), "x"), lend_hub_token=True)
    plain = harness.submit()["id"]
    own = harness.submit(recipe(n=1), {"X-Hub-Token": "hf_x"})["id"]
    harness.until_ended(own)
    assert {name for name, value in noted(harness, plain).items() if MINE in value} == set(HUB)
    assert [name for name, value in noted(harness, own).items() if MINE in value] == []
    assert noted(harness, own)["HF_HOME"].startswith(str(harness.settings.folder(own).absolute()))


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("lent", [False, True])
def test_the_planner_sees_nothing_of_the_operators(tmp_path: Path, lent: bool) -> None:
    """Its worker answers everybody, so it reads what a job without a token may read."""
    harness = ServiceHarness(tmp_path, lend_hub_token=lent)
    program = "import json, os, sys; sys.stdin.readline(); print(json.dumps({'plan': dict(os.environ)}), flush=True)"
    harness.service.planner.command = (sys.executable, "-c", program)
    seen = harness.service.planner.plan(RECIPE, (), caller="ann")["plan"]  # over HTTP its paths would be renamed
    harness.service.planner.close()
    assert {name for name, value in seen.items() if MINE in value} == (set(HUB) if lent else set())
    assert lent or seen["HF_HOME"] == str(harness.settings.hub_home.absolute())


def test_a_node_of_a_cluster_takes_its_own_credentials_out(tmp_path: Path) -> None:
    """The environment there is the node's, so the entrypoint cleans it; what the service gives the job stays."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={})

    folder = tmp_path / "a folder" / "jobs" / "0123456789ab"
    folder.mkdir(parents=True)
    given = {"LLMPRUNE_PROGRESS": str(folder / "p"), "HF_HOME": "/its/own", "HF_TOKEN_PATH": "/its/file"}
    launch = Launch("0123456789ab", 1, folder, ("run", "a b"), 0, (), given)
    Ray("http://head:8265", (stub(tmp_path),), grace=1.0, transport=httpx.MockTransport(handle)).start(launch)
    body = json.loads(asked[0].content)
    node = dict(os.environ) | HUB | OTHERS | body["runtime_env"]["env_vars"]
    subprocess.run(["sh", "-c", body["entrypoint"]], env=node, check=True)
    seen = dict(line.split("=", 1) for line in (folder / "environment").read_text().splitlines())
    assert [name for name, value in seen.items() if MINE in value] == []
    assert {name: seen[name] for name in given} == given
    assert seen["LLMPRUNE_JOB"] == "0123456789ab"


def test_the_entrypoint_quotes_what_it_gives(tmp_path: Path) -> None:
    """A data folder with blanks and quotes in its name stays one word of the shell's line."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={})

    folder = tmp_path / "it's a; folder" / "jobs" / "0123456789ab"
    launch = Launch("0123456789ab", 1, folder, ("run",), 0, (), {"HF_HOME": str(folder)}, keep_hub=True)
    Ray("http://head:8265", ("python",), grace=1.0, transport=httpx.MockTransport(handle)).start(launch)
    task = json.loads(shlex.split(json.loads(asked[0].content)["entrypoint"])[-1])
    assert task["environment"]["HF_HOME"] == str(folder)
    assert task["data_dir"] == str(folder.parents[1])
    assert task["keep_hub"]
