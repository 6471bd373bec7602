"""Jobs that need the files of others, where the artefact store stands between two machines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.service import RECIPE, recipe
from helpers.stored_service import Setting, make

from llmprune.common.errors import LLMPruneError
from llmprune.service.artifacts.fetch import fetch_use, is_here, remove_fetched
from llmprune.service.artifacts.manifest import keep_manifest, local_manifest
from llmprune.service.artifacts.parts import Use
from llmprune.service.artifacts.publisher import Publisher
from llmprune.service.artifacts.store import ArtifactStore, StoreUnreachable
from llmprune.service.supervisor.supervisor import Supervisor


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A service whose store is a folder."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        yield from make(folder, f"file://{folder / 'store'}", patch)


@pytest.fixture(scope="module")
def stored(setting: Setting) -> str:
    """A finished job whose model only the store has, as after a run on a node."""
    harness = setting.harness
    job: str = harness.submit(recipe(config=1))["id"]
    assert setting.until_ended(job)["state"] == "succeeded"
    Publisher(setting.store, job, 1, harness.settings.folder(job)).publish()
    shutil.rmtree(harness.run_folder(job) / "model")
    with harness.service.database.write() as connection:
        connection.execute("UPDATE jobs SET launcher = 'ray' WHERE id = ?", (job,))
    return job


def on_base(job: str) -> str:
    """Return a recipe that starts from the model of a job."""
    return RECIPE.replace("org/model", f"job://{job}")


def arguments(setting: Setting, job: str) -> list[str]:
    """Return the arguments that a fake run got."""
    found: list[str] = json.loads((setting.harness.run_folder(job) / "arguments.json").read_text())["argv"]
    return found


def test_a_job_of_this_machine_starts_from_a_stored_model(setting: Setting, stored: str) -> None:
    """Base and follow-up find the files where reports name them; when no job needs them, they are removed."""
    harness = setting.harness
    job = harness.submit(on_base(stored))
    assert job["base"] == stored
    assert setting.until_ended(job["id"])["state"] == "succeeded"
    assert f'model.id="{harness.run_folder(stored) / "model"}"' in arguments(setting, job["id"])
    work = {"work": {"kind": "evaluate", "tasks": ["arc_easy"]}}
    more = harness.http.post(f"/v1/jobs/{stored}/follow-ups", json=work).json()["id"]
    assert setting.until_ended(more)["state"] == "succeeded"
    assert (harness.run_folder(more) / "model" / "model.safetensors").stat().st_size == 2048
    harness.supervisor.round()
    assert not [*harness.run_folder(stored).glob("model"), *harness.settings.data_dir.glob("jobs/*/fetched")]
    assert (harness.run_folder(stored) / "report.json").is_file()


def test_a_job_elsewhere_starts_from_a_model_of_this_machine(setting: Setting) -> None:
    """The model is uploaded for the job that waits for it, and removed when no job needs it any more."""
    harness = setting.harness
    base = harness.submit(recipe(config=1, n=1))["id"]
    assert setting.until_ended(base)["state"] == "succeeded"
    job = harness.submit(on_base(base), launcher="ray")["id"]
    harness.supervisor.round()
    assert harness.job(job)["step"] == f"waits until the files of job {base} are in the artefact store"
    ended = setting.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 1), ended["error"]
    node = setting.cluster.node_of(job)
    assert node is not None
    assert f'model.id="{node.folder / "used" / base / "run" / "model"}"' in arguments(setting, job)
    assert not (node.folder / "used" / base).exists()
    harness.supervisor = Supervisor(harness.settings)  # its first round cleans up
    setting.wait(lambda: not setting.store.keys(f"{base}/"))
    assert local_manifest(harness.settings.folder(base)) is None
    assert (harness.run_folder(base) / "model" / "model.safetensors").is_file()


def test_a_store_that_does_not_answer_is_said(setting: Setting, stored: str, tmp_path: Path) -> None:
    """The job fails with the reason and the remedy; a retry with the store succeeds; cancelled, nothing is left."""
    harness, store = setting.harness, Path(setting.store.url.removeprefix("file://"))
    store.rename(tmp_path / "aside")
    store.write_text("a file where the folder was")
    job = harness.submit(on_base(stored) + "# away\n")["id"]
    ended = setting.until_ended(job)
    store.unlink()
    (tmp_path / "aside").rename(store)
    assert ended["state"] == "failed"
    assert f"files of job {stored} are only there: retry when it has them" in ended["error"]
    assert harness.http.post(f"/v1/jobs/{job}/retry").status_code == 200
    left = harness.run_folder(stored) / "model" / ".model.safetensors.fetched"
    left.parent.mkdir()
    left.touch()  # of a fetch that was killed together with the supervisor
    (harness.settings.folder(stored) / "fetched").touch()
    harness.supervisor = Supervisor(harness.settings)
    harness.supervisor._fetched.remove_unused()
    assert left.exists()  # the job waits for it
    assert harness.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    harness.supervisor.round()
    assert not left.parent.exists()


@pytest.fixture
def published(tmp_path: Path) -> ArtifactStore:
    """A store with the run folder of a job."""
    run = tmp_path / "source" / "run"
    (run / "model").mkdir(parents=True)
    for name in ("run.json", "report.json", "model/a", "model/b"):
        (run / name).write_text(f"contents of {name}")
    store = ArtifactStore(f"file://{tmp_path / 'store'}")
    Publisher(store, "job", 1, run.parent).publish()
    return store


def names(folder: Path) -> list[str]:
    """Return the names of the files under a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_fetch_that_is_killed_continues(
    published: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole files are kept, half a file is fetched anew; each part is fetched alone; damaged contents are refused."""
    asked: list[str] = []
    download = ArtifactStore.download

    def killed(store: ArtifactStore, key: str, path: Path) -> bool:
        asked.append(key)
        if len(asked) == 2:
            path.write_text("half")
            raise KeyboardInterrupt
        return download(store, key, path)

    monkeypatch.setattr(ArtifactStore, "download", killed)
    use, target = Use("job", "model"), tmp_path / "own" / "run"
    with pytest.raises(KeyboardInterrupt):
        fetch_use(published, use, run_folder=target)
    keep_manifest(target.parent, fetch_use(published, use, run_folder=target))
    assert names(target) == ["model/a", "model/b", "report.json"]
    assert (target / "model" / "b").read_text() == "contents of model/b"
    assert len(asked) == 4  # the first file, the report, once
    fetch_use(published, Use("job", "scores"), run_folder=target)
    assert names(target) == ["model/a", "model/b", "report.json", "run.json"]
    remove_fetched(target.parent)
    assert names(target) == ["report.json", "run.json"]
    published.write(asked[1], b"other contents")
    with pytest.raises(LLMPruneError, match="lacks model/a of job job"):
        fetch_use(published, use, run_folder=tmp_path / "other")
    with pytest.raises(LLMPruneError, match=r"shows no files.*of job unknown"):
        fetch_use(published, Use("unknown", "run"), run_folder=target)
    with pytest.raises(StoreUnreachable, match="retry when it has them"):
        fetch_use(ArtifactStore("file:///proc/none"), use, run_folder=tmp_path / "third")


def test_what_is_here_is_not_fetched(published: ArtifactStore, tmp_path: Path) -> None:
    """A job that lacks one file of the needed part is fetched."""
    source = tmp_path / "source"
    assert is_here(source, Use("job", "run"))
    (source / "run" / "model" / "b").write_text("short")
    assert not is_here(source, Use("job", "model"))
    assert is_here(source, Use("job", "scores"))
    assert not is_here(tmp_path / "nowhere", Use("job", "scores"))
