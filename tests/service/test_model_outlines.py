"""Outlines of models that only the artefact store has, from which recipes are planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import save_model, write_text
from helpers.service import YAML, ServiceHarness, recipe

from llmprune.checkpoint.weight_headers import headers_of_folder
from llmprune.service.artifacts.outline import OUTLINE, outline_of_model
from llmprune.service.artifacts.publisher import Publisher
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.planner import worker
from llmprune.service.planner.planner import Planner
from llmprune.service.supervisor.cleanup import remove_products, used_bytes


class PlannerHere(Planner):
    """Plans in this process, and keeps the folder of the model that it is asked about."""

    asked: Path

    def plan(self, recipe: str, overrides: Sequence[str], *, caller: str, wrong: Sequence[str] = ()) -> dict[str, Any]:
        """Return the answer of a worker."""
        self.asked = next(Path(json.loads(one[9:])) for one in overrides if one.startswith("model.id="))
        return dict(worker._answer(recipe, list(overrides), wrong=list(wrong)))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServiceHarness, PlannerHere, str]:
    """A service, its planner, and a job whose real model is only in the store, in two weights files."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "texts").mkdir()
    write_text(folder / "texts" / "text.txt")
    planner = PlannerHere(folder)
    harness = ServiceHarness(
        folder, planner, artifacts=f"file://{folder / 'store'}", allow_roots=(folder / "texts",), database_url=None
    )
    job = str(harness.submit(recipe(config=1))["id"])
    harness.until_ended(job)
    model = harness.run_folder(job) / "model"
    shutil.rmtree(model)
    save_model(model, intermediate_size=20_000)  # so that the outline is much smaller
    Publisher(store_of(harness), job, 1, harness.settings.folder(job)).publish()
    model.rename(folder / "model")
    return harness, planner, job


def store_of(harness: ServiceHarness) -> ArtifactStore:
    """Return the store of a service."""
    assert harness.settings.artifacts is not None
    return ArtifactStore(harness.settings.artifacts)


def plan_of(harness: ServiceHarness, job: str) -> Any:
    """Return the answer to the plan of a recipe that starts from a job's model."""
    text = f"model: {{id: job://{job}}}\ncalibration: {{dataset: text.txt, samples: 4, sequence_length: 32}}\n"
    return harness.http.post("/v1/recipes/plan", content=text + "depth: {remove: 1}\n", headers=YAML)


def test_a_model_in_the_store_is_planned_like_another(stored: tuple[ServiceHarness, PlannerHere, str]) -> None:
    """The plan equals that of the same model in the data folder; no weights are fetched, and no path is told."""
    harness, planner, job = stored
    answer = plan_of(harness, job)
    assert answer.status_code == 200, answer.text
    outline = planner.asked
    assert outline.parts[-3:-1] == (OUTLINE, "1-0")
    real = harness.settings.data_dir.parent / "model"
    assert headers_of_folder(outline, "it") == headers_of_folder(real, "it")
    weights = outline / "model.safetensors"
    assert weights.stat().st_size == (real / "model.safetensors").stat().st_size > 10 * used_bytes(weights.parent)
    assert (outline.parent / "report.json").is_file(), "it names the models that this one was pruned from"
    assert not (harness.run_folder(job) / "model").exists()
    shutil.copytree(real, harness.run_folder(job) / "model")
    try:
        local = plan_of(harness, job)
    finally:
        shutil.rmtree(harness.run_folder(job) / "model")
    assert planner.asked == harness.run_folder(job) / "model"
    of_the_machine = {"devices": None, "durations": None}
    assert answer.json() | of_the_machine == local.json() | of_the_machine
    before = weights.stat().st_mtime_ns
    assert outline_of_model(store_of(harness), harness.settings.folder(job)) == outline
    assert weights.stat().st_mtime_ns == before, "it is made once"


def test_a_store_that_is_away_is_named_and_a_damaged_file_too(stored: tuple[ServiceHarness, PlannerHere, str]) -> None:
    """Both are problems of the model, and leave nothing behind."""
    harness, _, job = stored
    place, store = harness.settings.folder(job), store_of(harness)
    shutil.rmtree(place / OUTLINE, ignore_errors=True)
    key = next(key for key in store.keys(f"{job}/objects/") if (store.read(key) or b"")[8:9] == b"{")
    whole = store.read(key) or b""
    store.write(key, b"\xff" * len(whole))
    assert "absent or damaged; run the job's recipe again" in plan_of(harness, job).text
    store.write(key, whole)
    root = Path(store.url.removeprefix("file://"))
    root.rename(root.with_name("away"))
    root.write_text("no folder")
    try:
        answer = plan_of(harness, job)
    finally:
        root.unlink()
        root.with_name("away").rename(root)
    assert (answer.status_code, "model.id: the model is only in the artefact store" in answer.text) == (422, True)
    outline_of_model(store, place)
    assert [path.name for path in (place / OUTLINE).iterdir() if path.is_dir()] == ["1-0"]


def test_the_clean_up_takes_the_outline_with_the_model(stored: tuple[ServiceHarness, PlannerHere, str]) -> None:
    """Nothing is left to plan with."""
    harness, _, job = stored
    assert outline_of_model(store_of(harness), harness.settings.folder(job)).is_dir()
    assert remove_products(harness.settings, harness.service.jobs, job=job) > 0
    assert not (harness.settings.folder(job) / OUTLINE).exists()
    assert "there is no job of this id with a finished model" in plan_of(harness, job).text
