"""Downloads from the hub: only the needed files, of one commit, despite faults of hub and network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.hub.faults import Fault
from helpers.hub.published import publish_model, publish_text
from helpers.hub.server import Hub
from helpers.tiny import tiny_tokenizer
from huggingface_hub import constants

from llmprune.checkpoint.loading import load_config, load_model, load_tokenizer, require_tokenizer
from llmprune.checkpoint.location import hub_commit, identity
from llmprune.common.errors import CalibrationError, CheckpointError, LLMPruneError
from llmprune.common.hub import client as remote
from llmprune.data.sources import commit_of
from llmprune.data.windows import load_windows
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.model import ModelSource
from llmprune.recipe.text_source import TextSource

BASE = ModelSource(id="org/base")


def fetched(hub: Hub) -> set[str]:
    """Return the names of the files that were downloaded."""
    return {line.rsplit("/", 1)[-1] for line in hub.lines if line.startswith("GET /org/base/resolve/")}


def refusal(source: ModelSource = BASE) -> str:
    """Return the message of the error that loading a model raises."""
    with pytest.raises(LLMPruneError) as caught:
        load_model(source)
    return str(caught.value)


def test_only_what_is_needed_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    """A config needs one file, a tokenizer the small files; weights are downloaded once, in one format."""
    publish_model(hub, tmp_path / "base")
    load_config(BASE)
    assert fetched(hub) == {"config.json"}
    load_tokenizer(BASE)
    assert fetched(hub) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("README.md", "LICENSE"),
    }
    load_model(BASE)
    load_model(BASE)
    assert sum(line.startswith("GET /cdn/") for line in hub.lines) == 1
    looked_up = [line for line in hub.lines if "/models/org/base/revision/" in line]
    assert len(looked_up) == 1, "the branch is looked up once"


def test_a_plan_asks_the_hub_for_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    """The tokenizer is checked by the names of the files, which are known with the config."""
    publish_model(hub, tmp_path / "base")
    load_config(BASE)
    before = list(hub.lines)
    require_tokenizer(BASE)
    assert hub.lines == before
    hub.add_repo("org/mute", {"config.json": (tmp_path / "base" / "config.json").read_bytes()})
    load_config(ModelSource(id="org/mute"))
    with pytest.raises(LLMPruneError, match="org/mute has no tokenizer"):
        require_tokenizer(ModelSource(id="org/mute"))


def test_sharded_weights_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    """Only the shards that the index names are downloaded."""
    base = tmp_path / "base"
    repo = publish_model(hub, base)
    load_model(ModelSource(id=str(base))).save_pretrained(base, max_shard_size="100KB")
    names = {path.name: hub.file(path.name, path.read_bytes()) for path in base.glob("model*")}
    assert len(names) > 2
    kept = {name: file for name, file in repo.commits[repo.refs["main"]].items() if name != "model.safetensors"}
    repo.commit("main", kept | {name: file for name, file in names.items() if name != "model.safetensors"}, "shards")
    load_model(BASE)
    assert sum(line.startswith("GET /cdn/") for line in hub.lines) == len(list(base.glob("model-*")))


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    """Each resolves to its commit, whose files are loaded and which identifies the model."""
    repo = publish_model(hub, tmp_path / "base")
    first = repo.refs["main"]
    repo.refs["v1"] = first
    config = repo.commits[first]["config.json"].content or b""
    changed = {"config.json": hub.file("config.json", config.replace(b'"vocab_size": 260', b'"vocab_size": 261'))}
    second = repo.commit("next", repo.commits[first] | changed, "one more token")
    sources = {revision: ModelSource(id="org/base", revision=revision) for revision in ("main", "v1", "next", second)}
    commits = {revision: hub_commit(source) for revision, source in sources.items()}
    assert commits == {"main": first, "v1": first, "next": second, second: second}
    assert load_config(sources["v1"]).vocab_size == 260
    assert load_config(sources["next"]).vocab_size == load_config(sources[second]).vocab_size == 261
    assert identity(sources["main"]) == first
    assert hub_commit(ModelSource(id=str(tmp_path / "base"))) is None


def test_private_and_gated_repositories_open_with_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_TOKEN gives access; without it a private repository is not found, and a gated one has a remedy."""
    publish_model(hub, tmp_path / "private", private=True)
    publish_model(hub, tmp_path / "gated", "org/gated", gated=True)
    load_config(BASE)
    load_config(ModelSource(id="org/gated"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other-cache"))
    monkeypatch.delenv("HF_TOKEN")
    remote.resolve_revision.cache_clear()
    assert "no such repository, or HF_TOKEN may not see it" in refusal()
    assert "it is gated; accept its terms" in refusal(ModelSource(id="org/gated"))


BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
LOOK, FILE, WEIGHTS = "GET /api/models/org/base/", "HEAD .*/config.json", "GET /cdn/"


@pytest.mark.parametrize(
    ("fault", "message", "patient"),
    [
        (Fault(LOOK, 401, headers=BAD_TOKEN), "the token is not valid; set HF_TOKEN", False),
        (Fault(LOOK, 403), "the hub answered 403 (a fault of the test): the token may not", False),
        (Fault(LOOK, 404, headers={"X-Error-Code": "RepoNotFound"}), "the hub has no such repository", False),
        (Fault(LOOK, 404, headers={"X-Error-Code": "RevisionNotFound"}), "the repository has no such revision", False),
        (Fault(LOOK, 429), "the hub answered 429 (a fault of the test): it asks for fewer requests", True),
        (Fault(LOOK, 500), "the hub answered 500 (a fault of the test), again and again", True),
        (Fault(FILE, 503), "the hub answered 503", True),
        (Fault(LOOK, 200, body="<html>a proxy's page"), "something that is no JSON", True),
        (Fault(WEIGHTS, 403), "its weights cannot be fetched: the hub answered 403", False),
    ],
    ids=lambda value: value.match if isinstance(value, Fault) else None,
)
def test_a_refusal_of_the_hub_is_one_clear_error(
    hub: Hub, tmp_path: Path, fault: Fault, message: str, patient: bool
) -> None:
    """Every answer gives an error with a remedy; temporary faults do only after several attempts."""
    publish_model(hub, tmp_path / "base")
    hub.faults.append(fault)
    assert message in refusal()
    assert (len(hub.waits) >= 5) == patient


@pytest.mark.parametrize(
    "fault",
    [
        Fault(LOOK, 429, times=2, headers={"Retry-After": "7"}),
        Fault(LOOK, 500, times=4),
        Fault(FILE, 502, times=3),
        Fault(WEIGHTS, 429, times=2),
        Fault(WEIGHTS, 500, times=2),
        Fault(WEIGHTS, cut=1000, times=3),
        Fault(WEIGHTS, flip=True, times=1),
    ],
    ids=["429", "500", "502 of a file", "429 of weights", "500 of weights", "cut", "flip"],
)
def test_temporary_faults_are_retried(hub: Hub, tmp_path: Path, fault: Fault) -> None:
    """After busy answers, server errors, broken connections or wrong bytes, the weights are correct."""
    publish_model(hub, tmp_path / "base")
    hub.faults.append(fault)
    model = load_model(BASE)
    local = load_model(ModelSource(id=str(tmp_path / "base")))
    assert all(a.equal(b) for a, b in zip(model.parameters(), local.parameters(), strict=True))
    assert fault.times == 0
    if "Retry-After" in fault.headers:
        assert hub.waits == [7, 7]


@pytest.mark.parametrize("asked", ["7200", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
@pytest.mark.parametrize(
    ("status", "message"), [(429, "it asks for fewer requests; wait, and run the same"), (503, "run the same command")]
)
def test_a_hub_that_asks_for_hours_is_an_error(hub: Hub, tmp_path: Path, status: int, message: str, asked: str) -> None:
    """A Retry-After of more than a few minutes, in seconds or as a date, is an error at once."""
    publish_model(hub, tmp_path / "base")
    hub.faults.append(Fault(LOOK, status, headers={"Retry-After": asked}))
    assert message in refusal()
    assert hub.waits == []


def test_a_download_continues_where_it_stopped(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a broken connection only the rest is requested."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # bytes that the client writes at a time
    publish_model(hub, tmp_path / "base")
    hub.faults.append(Fault(WEIGHTS, cut=100_000, times=1))
    ranges: list[str] = []
    hub.on_range = ranges.append
    load_model(BASE)
    assert ranges == ["bytes=100000-"]


def test_weights_that_stay_wrong_are_refused(hub: Hub, tmp_path: Path) -> None:
    """Two downloads with a wrong SHA-256 give an error, and the cache has no weights."""
    publish_model(hub, tmp_path / "base")
    hub.faults.append(Fault(WEIGHTS, flip=True))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors of org/base does not have the SHA-256 .* in two downloads"
    ):
        load_model(BASE)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    hub.faults.clear()
    load_model(BASE)


def test_a_cached_model_loads_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE a downloaded model loads without a request; a missing part is an error."""
    publish_model(hub, tmp_path / "base")
    load_config(BASE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote.resolve_revision.cache_clear()
    hub.lines.clear()
    assert "HF_HUB_OFFLINE is set, so only the cache was looked at" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_model(BASE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote.resolve_revision.cache_clear()
    hub.lines.clear()
    load_model(BASE)
    assert hub.lines == []


def test_an_unreachable_hub_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing answers, there are no retries."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "_sleep", lambda _: pytest.fail("waited"))
    remote.resolve_revision.cache_clear()
    for read in (load_config, lambda _: load(dataset="org/text")):
        with pytest.raises(
            LLMPruneError, match=r"the hub cannot be reached at http://127\.0\.0\.1:9 .*check the network"
        ):
            read(BASE)


def test_a_data_set_is_read_at_its_commit(hub: Hub) -> None:
    """A branch is resolved once, so a later commit changes nothing; the commit of the data is known."""
    repo = publish_text(hub)
    first = repo.refs["main"]
    source = TextSource(dataset="org/text")
    assert commit_of(source) == first
    later = repo.commit("main", {"train.jsonl": hub.file("train.jsonl", b'{"text": "other"}\n' * 9)}, "other rows")
    before = list(load(dataset="org/text", revision=first))
    assert list(load(dataset="org/text")) == before, "main was looked up before the new commit"
    remote.resolve_revision.cache_clear()
    assert list(load(dataset="org/text")) != before
    assert commit_of(source) == later
    assert commit_of(TextSource(dataset="here.txt")) is None


def load(**settings: Any) -> list[int]:
    """Return the first tokens under the tiny tokenizer."""
    tokens: list[int] = (
        load_windows(Calibration(**settings), tiny_tokenizer(), default_shape=(2, 16)).windows_NL.flatten().tolist()
    )
    return tokens


def test_a_data_set_that_is_refused_says_why(hub: Hub) -> None:
    """The message for a data set has the hub's reason, like that for a model."""
    with pytest.raises(
        CalibrationError, match=r"'org/none' \(default, train\) cannot be read: the hub has no such rep"
    ):
        load(dataset="org/none")
    publish_text(hub)
    with pytest.raises(
        CalibrationError, match=r"cannot be read: the repository has no such revision; check the branch"
    ):
        load(dataset="org/text", revision="nowhere")
