"""Launchers: a new one is a class and a name in the registry, and every part of the service knows it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers import LAUNCHERS, offered_launchers, remote_launchers
from llmprune.service.supervisor.launchers.base import GONE, AttemptState, Launch, Launcher


class Inline(Launcher):
    """Runs a job to its end while it starts, as on a machine that is always free."""

    on_this_machine = False

    def __init__(self, command: tuple[str, ...]) -> None:
        self.command = command

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make the launcher with the service's command of llmprune."""
        return cls(settings.command)

    def capacity(self) -> int:
        """Return 1: the next job can start once the last one has ended."""
        return 1

    def start(self, launch: Launch) -> None:
        """Run the job and write its exit code."""
        launch.working_dir.mkdir(parents=True)
        with launch.log.open("ab") as log:
            command = (*self.command, *launch.arguments)
            code = subprocess.call(command, cwd=launch.working_dir, env=launch.environment, stdout=log, stderr=log)
        launch.exit_file.write_text(str(code))

    def poll(self, launch: Launch) -> AttemptState:
        """Return the exit code."""
        return AttemptState("ended", int(launch.exit_file.read_text())) if launch.exit_file.exists() else GONE

    def stop(self, launch: Launch, force: bool) -> None:
        """Do nothing: no process runs between two calls."""


@pytest.fixture
def inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServiceHarness:
    """A service with one more launcher, which is one line in the registry."""
    monkeypatch.setitem(LAUNCHERS, "inline", Inline)
    return ServiceHarness(tmp_path)


def test_a_new_launcher_runs_jobs(inline: ServiceHarness) -> None:
    """Its job starts, ends and has its results, and takes no slot of this machine."""
    job = inline.submit(recipe(say="hello"), launcher="inline")
    assert (job["launcher"], job["gpus"]) == ("inline", 0)
    ended = inline.until_ended(job["id"])
    assert (ended["state"], ended["exit_code"], ended["attempts"]) == ("succeeded", 0, 1), ended["error"]
    assert inline.http.get(f"/v1/jobs/{job['id']}/log").text == "hello\n"
    assert "inline" in remote_launchers(inline.settings)
    failed = inline.until_ended(inline.submit(recipe(exit=1), launcher="inline")["id"])
    assert (failed["state"], failed["exit_code"]) == ("failed", 1)


def test_a_new_launcher_is_offered_everywhere(inline: ServiceHarness) -> None:
    """The queue lists it, the page for a new job has it, and the message about an unknown one names it."""
    offered = list(offered_launchers(inline.settings))
    assert "inline" in offered
    assert inline.http.get("/v1/queue").json()["launchers"] == offered
    assert "<option>inline</option>" in inline.http.get("/submit", headers={"Accept": "text/html"}).text
    wrong = inline.http.post("/v1/jobs", content=RECIPE, params={"launcher": "slurm"}, headers=YAML)
    assert wrong.json()["problems"] == [f"launcher: 'slurm' is not offered; choose {', '.join(offered)}"]


def test_the_api_describes_every_launcher(tmp_path: Path) -> None:
    """The OpenAPI document names the launchers of the registry, whether or not this service offers them."""
    parameters = ServiceHarness(tmp_path).app.openapi()["paths"]["/v1/jobs"]["post"]["parameters"]
    (described,) = [one["description"] for one in parameters if one["name"] == "launcher"]
    assert all(name in described for name in LAUNCHERS)
