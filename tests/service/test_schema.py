"""Schemathesis over the OpenAPI document: the service does what the document says, whatever is sent.

``SCHEMA_EXAMPLES=500 pytest tests/service/test_schema.py`` sends more requests.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import schemathesis
from helpers.service import ServiceHarness, recipe
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import ignored_auth, negative_data_rejection, positive_data_acceptance
from schemathesis.config import ChecksConfig, GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.schemas import BaseSchema

from llmprune.service.api.jobs.recipes import EXAMPLE
from llmprune.service.planner.planner import Planner

EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "6"))
# A worker that answers every question at once.
PLANS = (sys.executable, "-c", 'for _ in open(0): print(\'{"plan": {"layers": 28}}\', flush=True)')
KNOWN: dict[str, str] = {}  # jobs by state


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseSchema, dict[str, str]]:
    """The document of a service with a token, jobs in three states, and no limits on requests."""
    folder = tmp_path_factory.mktemp("schema")
    harness = ServiceHarness(folder, Planner(folder, PLANS), rate=1e6, burst=10**6, max_queued=10**6)
    for state, text in (("succeeded", recipe()), ("failed", recipe(exit=1))):
        KNOWN[state] = harness.submit(text)["id"]
        assert harness.until_ended(KNOWN[state])["state"] == state
    KNOWN["queued"] = harness.submit()["id"]
    now = time.monotonic()  # no supervisor runs from here on, and its last heartbeat counts as fresh
    harness.app.state.service = replace(harness.service, clock=lambda: now)
    token = {"Authorization": f"Bearer {harness.service.tokens.create('ann', 'admin')}"}
    generation = GenerationConfig(with_security_parameters=False)
    # A body may also be too large: which bodies are made depends on the modules that other tests have imported.
    refused = [str(status) for status in (400, 401, 403, 404, 405, 409, 411, 413, 415, 416, 422, 429)]
    checks = ChecksConfig.from_dict({"negative_data_rejection": {"expected-statuses": [*refused, "5xx"]}})
    project = ProjectConfig(generation=generation, checks=checks)
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    return schemathesis.openapi.from_asgi("/v1/openapi.json", harness.app, config=config, headers=token), token


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_service_does_what_its_document_says(
    described: tuple[BaseSchema, dict[str, str]],
    mode: GenerationMode,
    subtests: pytest.Subtests,
) -> None:
    """Answers have a documented status, type and shape; wrong input is refused and valid input accepted."""
    document, token = described
    for found in document.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.path_parameters or operation.query or operation.body):
            continue  # it has no input that could be wrong
        with subtests.test(operation.label):
            call_operation(operation, mode, token)


def call_operation(operation: schemathesis.APIOperation, mode: GenerationMode, token: dict[str, str]) -> None:
    """Call one operation with valid or invalid parameters and bodies."""

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def call(case: schemathesis.Case) -> None:
        chance = zlib.crc32(case.as_curl_command().encode())
        if mode is GenerationMode.POSITIVE and "job" in case.path_parameters and chance % 4:
            case.path_parameters["job"] = KNOWN[("succeeded", "failed", "queued")[chance % 3]]
        if operation.path.endswith("/events") and case.path_parameters["job"] == KNOWN["queued"]:  # it would not end
            case.path_parameters["job"] = KNOWN["succeeded"]
        excluded = [ignored_auth]  # authentication has its own tests
        if operation.body or "hand_over_to" in case.query:  # a valid recipe, or user, needs more than its shape
            excluded.append(positive_data_acceptance)
            if operation.path.endswith("/validate"):  # it answers 200 with the problems
                excluded.append(negative_data_rejection)
            if mode is GenerationMode.POSITIVE and chance % 2:
                case.body = EXAMPLE
        case.call_and_validate(headers=token, excluded_checks=excluded)

    call()


def test_a_missing_job_is_reported_before_a_stream_begins(tmp_path: Path) -> None:
    """The events of a job that does not exist are a 404 and no stream that breaks."""
    answer = ServiceHarness(tmp_path).http.get(f"/v1/jobs/{'0' * 12}/events")
    assert (answer.status_code, answer.json()["title"]) == (404, "not found")


def test_a_wrong_method_gets_the_allowed_ones(tmp_path: Path) -> None:
    """Allow names every method of an address, also those of other routes."""
    answer = ServiceHarness(tmp_path).http.put("/v1/jobs")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, POST")
