"""Interface of the Python client: both clients are one source, know every operation, and do what the guide says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from helpers.reports import sample_report
from helpers.service import BASE, RECIPE, ServiceHarness

import llmprune
from llmprune import AsyncClient

ROOT = Path(__file__).parents[2]
AIO = ROOT / "llmprune" / "service" / "client" / "aio"
NOT_FOR_PYTHON = {"GET /v1/health", "GET /v1/metrics"}  # the client asks /v1/ready; metrics are for Prometheus


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service for the tests of this file."""
    return ServiceHarness(tmp_path_factory.mktemp("python"), rate=1e6, burst=10**6)


def test_the_blocking_client_is_made_from_the_asynchronous_one() -> None:
    """The files in sync are what make client writes."""
    made = runpy.run_path(str(ROOT / ".ci" / "sync_client.py"))
    for name in made["FILES"]:
        assert made["sync_source"](name) == (AIO.parent / "sync" / name).read_text(encoding="utf-8"), "make client"


def operations_of(source: str) -> Iterator[str]:
    """Method and path of each call in the source of a client; values in a path are left out."""
    for function in re.split(r"\basync def ", source):
        paths = re.findall(r'\bpath = (f?"[^"]*")', function)
        plain = function.replace('Call("POST", path', f'Call("POST", {paths[0]}') if paths else function
        for method in ("GET", "PUT", "DELETE"):
            plain = plain.replace(f'Call("{method}", path', f'Call("{method}", {paths[0]}') if paths else plain
        plain = plain.replace("{self._path}", "/v1/jobs/{}").replace("{job_path(job)}", "/v1/jobs/{}")
        plain = re.sub(r"self\._path|job_path\([\w.]+\)", '"/v1/jobs/{}"', plain)
        found = re.findall(r'\bCall\(\s*"([A-Z]+)",\s*f?"([^"]+)"', plain)
        found += [("POST", path) for path in re.findall(r'recipe_call\("([^"]+)"', plain)]
        found += [("GET", path) for path in re.findall(r'\.(?:events|download)\(f"([^"]+)"', plain)]
        yield from (f"{method} {re.sub(r'{.*?}', '{}', path).split('?')[0]}" for method, path in found)


def test_every_operation_of_the_api_has_a_method(harness: ServiceHarness) -> None:
    """Each method and path of the OpenAPI document is in the client, or is named above with the reason."""
    known = {one for path in AIO.glob("*.py") for one in operations_of(path.read_text(encoding="utf-8"))}
    asked = {
        f"{method.upper()} {re.sub(r'{.*?}', '{}', path)}"
        for path, methods in harness.app.openapi()["paths"].items()
        for method in methods
    }
    assert asked - known == NOT_FOR_PYTHON, "see docs/develop/add-a-client-method.md"
    assert known <= asked


def test_every_parameter_of_the_api_has_a_name(harness: ServiceHarness) -> None:
    """Each query parameter of the OpenAPI document is one of a method, or of the settings that methods take."""
    source = "".join(path.read_text(encoding="utf-8") for path in (*AIO.glob("*.py"), AIO.parent / "calls.py"))
    named = {
        parameter["name"]
        for methods in harness.app.openapi()["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    }
    assert named
    assert named <= set(re.findall(r"\w+", source)), "see docs/develop/add-a-client-method.md"


class Instant:
    """A planner that answers every recipe with one plan."""

    def plan(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the plan."""
        size = sample_report().dense.model_dump(mode="json")
        numbers = {"keep_layers": 28, "calibration": [8, 32], "memory": {"weights": 1}, "disk": 1, "later_field": 1}
        names = {"model": "org/model", "model_type": "llama", "dtype": "float32", "removed_layers": None}
        return {"plan": names | numbers | {"dense": size, "pruned": size, "parameters_exact": True}}


def test_the_examples_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of the guide runs, one after the other, on a service whose runs are quick."""
    harness = ServiceHarness(tmp_path, Instant(), rate=1e6, burst=10**6, slots=2)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/report"):
            return httpx.Response(200, text=sample_report().model_dump_json())
        return harness.forward(request)

    def make_asynchronous(_: str) -> AsyncClient:
        return AsyncClient(BASE, transport=httpx.ASGITransport(app=harness.app))

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llmprune, "Client", lambda _: harness.client(answer), raising=False)
    monkeypatch.setattr(llmprune, "AsyncClient", make_asynchronous, raising=False)
    guide = (ROOT / "docs" / "guides" / "python-client.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    with harness.supervised():
        for block in blocks:
            if "create_user" in block:  # for admins: until then the service has no users
                token = harness.service.tokens.create("root", "admin")
                names["client"].connection.http.headers["Authorization"] = f"Bearer {token}"
                monkeypatch.setenv("LLMPRUNE_TOKEN", token)
            exec(compile(block, "python-client.md", "exec"), names)
    assert (tmp_path / "results" / "three-quarters" / "report.json").is_file()
    assert (tmp_path / "model.tar").is_file()


def test_the_client_imports_nothing_heavy() -> None:
    """Neither torch nor the server's own libraries are needed to talk to a service."""
    program = (
        "import sys\nfrom llmprune import AsyncClient, Client\nassert Client and AsyncClient\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'fastapi', 'IPython'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
