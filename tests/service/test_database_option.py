"""Choice of the database by an option, and an answer of it that is lost."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command
from helpers.service import RECIPE, YAML, ServiceHarness

from llmprune.common.errors import RecipeError
from llmprune.service.cli.database_option import database_url
from llmprune.service.database.database import DatabaseUnavailable
from llmprune.service.jobs.hub_token import has_token
from llmprune.service.jobs.store import JobStore


class LostAnswer(JobStore):
    """A job table whose answer to a submission is lost after it was written."""

    def add(self, *arguments: Any, **settings: Any) -> Any:
        """Queue the job, and lose the answer."""
        super().add(*arguments, **settings)
        raise DatabaseUnavailable("the database cannot be reached at the moment", reason="lost")


def test_a_job_whose_answer_was_lost_keeps_its_folder(tmp_path: Path) -> None:
    """A submission that got a 503 may be queued: its hub token stays, and the same key finds it."""
    harness = ServiceHarness(tmp_path)
    headers = YAML | {"Idempotency-Key": "k", "X-Hub-Token": "hf_secret"}
    harness.app.state.service = replace(harness.service, jobs=LostAnswer(harness.service.database))
    assert harness.http.post("/v1/jobs", content=RECIPE, headers=headers).status_code == 503
    harness.app.state.service = harness.service
    answer = harness.http.post("/v1/jobs", content=RECIPE, headers=headers)
    assert harness.service.jobs.counts(viewer=None)["queued"] == 1
    assert has_token(harness.settings.folder(answer.json()["id"]))


def test_a_password_stays_out_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password is refused on the command line, and kept out of the address that comes from the variable."""
    monkeypatch.setenv("PGPASSWORD", "")
    with pytest.raises(RecipeError, match="every user of this machine can read a password") as refused:
        database_url("postgresql://ann:s3cret@host/jobs")
    assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("LLMPRUNE_DATABASE", "postgresql://ann:s3cret@host/jobs")
    address = database_url(None)
    assert address is not None
    assert ("s3cret" in address, "host=host" in address, os.environ["PGPASSWORD"]) == (False, True, "s3cret")
    for wrong in ("mysql://host/jobs", "postgresql://host/jobs?colour=red"):
        with pytest.raises(RecipeError, match="give"):
            database_url(wrong)


def test_a_missing_client_is_an_error_with_its_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without psycopg the option is refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "llmprune.service.database.postgresql")
    outcome = command("token", "list", "--data-dir", tmp_path, "--database", "postgresql://host/jobs")
    assert (outcome.code, "pip install 'llmprune[postgresql]'" in outcome.err) == (2, True), outcome.err
