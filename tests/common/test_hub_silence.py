"""A hub, or a proxy before it, that accepts connections and says nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hub.faults import Fault
from helpers.hub.published import publish_model, publish_text
from helpers.hub.server import Hub as Server

from llmprune.checkpoint.loading import load_config, load_model
from llmprune.common import waiting
from llmprune.common.errors import LLMPruneError, ServiceError
from llmprune.common.hub import time_limits
from llmprune.common.hub.explanations import endpoint
from llmprune.data.sources import load_text
from llmprune.publish.preflight import check_push
from llmprune.publish.upload import additions, upload
from llmprune.recipe.hub import Hub
from llmprune.recipe.model import ModelSource
from llmprune.recipe.text_source import TextSource
from llmprune.service.client.sync.client import Client

BASE = ModelSource(id="org/base")
HUB = Hub(repo_id="org/pruned")


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_READ", "_PROCESS", "_WRITE"):
        monkeypatch.setattr(time_limits, name, 0.15)
    monkeypatch.setattr(waiting, "PAUSES", (0.05, 0.05, 10.0))


def read_text(_: Path) -> None:
    """Open a data set of the hub."""
    next(iter(load_text(TextSource(dataset="org/text"))))


def push(folder: Path) -> None:
    """Upload one file."""
    (folder / "llmprune.json").write_text("{}")
    upload(HUB, additions({"llmprune.json": folder / "llmprune.json"}), message="a message")


@pytest.mark.parametrize(
    ("silent", "ask"),
    [
        ("GET /api/models/org/base", lambda _: load_config(BASE)),
        ("GET /api/models/org/base/tree", lambda _: load_model(BASE)),
        ("GET /api/datasets/org/text", read_text),
        ("GET /api/whoami", lambda _: check_push(HUB)),
        ("POST /api/repos/create", push),
        ("POST .*/preupload", push),
        ("POST .*/commit", push),
    ],
)
def test_a_silent_hub_is_named_while_it_is_waited_for_and_given_up(
    silent: str, ask: Callable[[Path], object], hub: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each request ends in its time; before that a line says whom it waits for, and for what."""
    publish_model(hub, tmp_path / "base")
    publish_text(hub)
    hub.faults.append(Fault(silent, silent=True))
    with pytest.raises(LLMPruneError, match="accepts connections and does not answer; check HF_ENDPOINT and the proxy"):
        ask(tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name == "llmprune.common.waiting"]
    assert any(line.startswith("waiting for the hub at 127.0.0.1:") and "/api/" in line for line in said)


def test_a_limit_of_the_caller_is_kept(hub: Server) -> None:
    """The hub client's own limit of a request stays, and gaps in it are filled."""
    from huggingface_hub import get_session

    time_limits.limit_waits()
    request = get_session().build_request("GET", endpoint(), timeout=7)
    assert time_limits._limits(request) == dict.fromkeys(("connect", "read", "write", "pool"), 7)
    request = get_session().build_request("PUT", endpoint(), timeout=None)
    assert None not in time_limits._limits(request).values()


def test_a_quick_answer_is_not_announced(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes within 5 s is no news."""
    monkeypatch.setattr(waiting, "PAUSES", (5.0, 25.0, 60.0))
    with waiting.announce_wait("somebody", "something"):
        pass
    assert not caplog.records


def test_a_silent_service_is_named_too(caplog: pytest.LogCaptureFixture) -> None:
    """The client of the service says whom it waits for, and ends in its time."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Client(f"http://127.0.0.1:{server.getsockname()[1]}") as client,
    ):
        client.connection.http.timeout = 0.2
        with pytest.raises(ServiceError, match="does not finish its answer"):
            client.queue()
    assert f"waiting for {client.server}" in caplog.text
    assert "GET /v1/queue" in caplog.text
