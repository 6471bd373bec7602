"""The files with which operators deploy the service: containers, Kubernetes, a reverse proxy, a dashboard, alerts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import kubernetes_validate
import promql_parser
import pytest
import typer
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from helpers.service import ServiceHarness, answers, free_port, recipe, served

from llmprune.cli.main import app
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.server import write_first_token
from llmprune.service.users.tokens import Tokens

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
WORDS = {"$instance": ".*", "$source": "source"}


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """A service in this process."""
    return ServiceHarness(tmp_path)


def documents(name: str) -> list[Any]:
    """Return the YAML documents of a file."""
    return list(yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8")))


def expressions() -> dict[str, str]:
    """Return the queries of the dashboard and of the alerts, by title."""
    panels = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))["panels"]
    found = {f"{panel['title']} {one['refId']}": one["expr"] for panel in panels for one in panel["targets"]}
    (rules,) = documents("docs/deploy/prometheus-rules.yml")
    return found | {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(harness: ServiceHarness) -> None:
    """Every query is valid PromQL, and every metric and state in it is one that the service shows."""
    harness.submit()
    text = harness.http.get("/v1/metrics").text
    known = set(re.findall(r"^(llmprune_\w+)", text, re.MULTILINE))
    states = set(re.findall(r'llmprune_jobs\{state="(\w+)"\}', text))
    asked = expressions()
    assert len(asked) > 20
    for title, query in asked.items():
        for word, value in WORDS.items():
            query = query.replace(word, value)
        promql_parser.parse(query)
        assert set(re.findall(r"llmprune_\w+", query)) <= known, title
        for names in re.findall(r'state=~?"([\w|]+)"', query):
            assert set(names.split("|")) <= states, title


def test_metrics_show_the_machine(harness: ServiceHarness) -> None:
    """A waiting job waits in the gauges too; a supervisor that has not begun is not alive."""
    assert "llmprune_queue_oldest_seconds 0.0\n" in harness.http.get("/v1/metrics").text
    harness.submit()
    text = harness.http.get("/v1/metrics").text
    assert "llmprune_supervisor_alive 0.0" in text
    assert "llmprune_queue_oldest_seconds 0.0\n" not in text
    harness.supervisor.round()
    assert "llmprune_supervisor_alive 1.0" in harness.http.get("/v1/metrics").text
    assert float(re.findall(r"^llmprune_disk_free_bytes (\S+)", text, re.MULTILINE)[0]) > 0


def test_grafana_reads_the_dashboard() -> None:
    """Grafana's own model of a dashboard loads the file and loses nothing that a panel needs; panels do not overlap."""
    text = (DEPLOY / "grafana.json").read_text(encoding="utf-8")
    loaded = json.loads(json.dumps(Dashboard.from_json(json.loads(text)), cls=JSONEncoder))
    had = json.loads(text)["panels"]
    assert [panel["title"] for panel in loaded["panels"]] == [panel["title"] for panel in had]
    for panel, before in zip(loaded["panels"], had, strict=True):
        assert panel["type"] == before["type"]
        assert [one["expr"] for one in panel["targets"]] == [one["expr"] for one in before["targets"]]
        assert panel["fieldConfig"]["defaults"]["unit"] == before["fieldConfig"]["defaults"]["unit"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in had)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def test_kubernetes_takes_the_manifests() -> None:
    """Each manifest fits the schema of its kind, without a field that Kubernetes does not know."""
    manifests = documents("docs/deploy/kubernetes.yaml")
    assert {one["kind"] for one in manifests} >= {"StatefulSet", "Service", "Ingress"}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def commands() -> Iterator[list[str]]:
    """Yield the arguments of the service's container in each file."""
    (compose,) = documents("compose.yaml")
    yield compose["services"]["llmprune"]["command"]
    for manifest in documents("docs/deploy/kubernetes.yaml"):
        if manifest["kind"] == "StatefulSet":
            for container in manifest["spec"]["template"]["spec"]["containers"]:
                yield container["args"]


def test_containers_start_with_options_that_there_are() -> None:
    """``llmprune serve`` takes the arguments of every file, and its data is on a volume."""
    group: Any = typer.main.get_command(app)
    found = list(commands())
    assert len(found) == 2
    for name, *arguments in found:
        context = group.commands[name].make_context(name, list(arguments))
        assert str(context.params["data_dir"]) == "/data"
    assert "/data" in (ROOT / "Dockerfile").read_text(encoding="utf-8")  # a new volume takes its owner from there


def test_compose_files_mount_what_there_is() -> None:
    """Files of the repository that containers mount exist, and named volumes are declared."""
    (compose,) = documents("compose.yaml")
    (gpu,) = documents("compose.gpu.yaml")
    assert set(gpu["services"]) <= set(compose["services"])
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.rsplit(":/", 1)[0]
            if source.startswith("./"):
                assert (ROOT / source).is_file(), source
            elif not source.startswith("$"):
                assert source in compose["volumes"]


def test_the_first_token_is_made_once(harness: ServiceHarness, tmp_path: Path) -> None:
    """The file has a token of an admin, only its owner reads it, and a second start makes none."""
    file = tmp_path / "first"
    write_first_token(harness.settings, file)
    token = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    answer = harness.http.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200
    file.unlink()
    write_first_token(harness.settings, file)
    assert not file.exists()


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """A service behind nginx with the documented file; names, ports and certificates are changed."""
    if NGINX is None:
        pytest.skip("there is no nginx here: apt-get install nginx-light")
    folder = tmp_path_factory.mktemp("proxy")
    plain, secure = free_port(), free_port()
    with served(folder, trusted_proxies=("127.0.0.1/32",), host_names=("pruner.example.org",)) as (_, settings):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", "/CN=pruner.example.org", "-addext", "subjectAltName=DNS:pruner.example.org"),
                *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
            ],
            check=True,
            capture_output=True,
        )
        site = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
        for old, new in {
            "127.0.0.1:8321": f"127.0.0.1:{settings.port}",
            "listen 80;": f"listen 127.0.0.1:{plain};",
            "listen 443 ssl;": f"listen 127.0.0.1:{secure} ssl;",
            "/etc/ssl/certs/pruner.pem": str(folder / "cert.pem"),
            "/etc/ssl/private/pruner.key": str(folder / "key.pem"),
        }.items():
            assert old in site
            site = site.replace(old, new)
        paths = "".join(
            f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off;\npid {folder}/nginx.pid;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{site}}}\n"
        )
        command = [NGINX, "-e", folder / "error.log", "-c", folder / "nginx.conf"]
        process = subprocess.Popen(command, cwd=folder)
        try:
            while process.poll() is None and not answers(secure):
                pass
            assert process.poll() is None, (folder / "error.log").read_text()
            context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
            headers = {"Host": "pruner.example.org"}
            with httpx.Client(
                base_url=f"https://127.0.0.1:{secure}", verify=context, headers=headers, follow_redirects=False
            ) as outside:
                yield outside, settings.data_dir
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def through(outside: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """Send a request as a browser does that knows the proxy's name."""
    return outside.request(method, path, extensions={"sni_hostname": "pruner.example.org"}, **options)


def test_behind_the_documented_proxy(proxied: tuple[httpx.Client, Path]) -> None:
    """Sign-in gives a Secure cookie, forged addresses are not believed, and events arrive before their stream ends."""
    outside, data = proxied
    token = Tokens(SqliteDatabase(data / "service.sqlite3")).create("ann", "user")
    headers = {"Authorization": f"Bearer {token}"}
    answer = through(outside, "POST", "/login", data={"token": token}, headers={"X-Forwarded-For": "203.0.113.7"})
    assert answer.status_code == 303
    assert "Secure" in answer.headers["set-cookie"]
    job = through(
        outside,
        "POST",
        "/v1/jobs",
        content=recipe(pause=30),
        headers={**headers, "Content-Type": "application/yaml"},
    ).json()["id"]
    with outside.stream(
        "GET", f"/v1/jobs/{job}/events", headers=headers, extensions={"sni_hostname": "pruner.example.org"}
    ) as events:
        assert "queued" in next(line for line in events.iter_lines() if line.startswith("data:"))
    through(outside, "POST", f"/v1/jobs/{job}/cancel", headers=headers)
    logged = [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]
    assert {line.get("address") for line in logged if line.get("address")} == {"127.0.0.1"}
