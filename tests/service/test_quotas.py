"""Quotas of users, at the submission and at the start of jobs, and turns between users in the queue."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.service.jobs.fair_order import in_turn
from llmprune.service.supervisor.cleanup import measure_jobs, remove_products
from llmprune.service.users.quotas import OwnQuotas, default_quotas, set_own_quotas, usage_of

FILES = ("report.json", "model/config.json", "model/model.safetensors")


class Two:
    """A service with the users ann and bob."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.harness = ServiceHarness(folder, **changes)
        service = self.harness.service
        self.database = service.database
        self.headers = {
            name: {"Authorization": f"Bearer {service.tokens.create(name, role)}"}
            for name, role in (("ann", "user"), ("bob", "user"), ("root", "admin"))
        }

    def submit(self, owner: str, text: str = RECIPE, **params: Any) -> str:
        """A new job of a user."""
        return str(self.harness.submit(text, headers=self.headers[owner], **params)["id"])

    def refusal(self, owner: str, **params: Any) -> str:
        """The sentence with which a quota refuses a submission."""
        headers = YAML | self.headers[owner]
        answer = self.harness.http.post("/v1/jobs", content=RECIPE, params=params, headers=headers)
        assert (answer.status_code, "Retry-After" in answer.headers) == (429, True), answer.text
        return str(answer.json()["detail"])

    def own(self, owner: str, quotas: OwnQuotas) -> None:
        """Give a user quotas."""
        set_own_quotas(self.database, owner, quotas=quotas)

    def states(self, *jobs: str) -> list[str]:
        """States after one round of the supervisor."""
        self.harness.supervisor.round()
        found = [self.harness.service.jobs.get(job) for job in jobs]
        return [job.state if job else "gone" for job in found]

    def end(self, *jobs: str) -> None:
        """Cancel jobs, and wait for their end."""
        for job in jobs:
            self.harness.http.post(f"/v1/jobs/{job}/cancel", headers=self.headers["root"])
        while any(state in ("running", "cancelling") for state in self.states(*jobs)):
            pass


def test_quotas_at_the_submission(tmp_path: Path) -> None:
    """Each quota refuses with its figures; a user's own value beats the service's, and null lifts it."""
    two = Two(tmp_path, gpus=("0", "1"), max_queued=2, max_gpus=1, jobs_per_day=3)
    two.submit("ann", gpus=0)
    assert two.refusal("ann", gpus=2) == (
        "quota 'GPUs at a time': the job needs 2, and ann may use 1; give fewer, or ask an admin for more"
    )
    gone = two.submit("ann", gpus=0)
    assert two.refusal("ann") == (
        "quota 'Jobs waiting': ann has 2 of 2; wait until one starts, cancel one, or ask an admin for more"
    )
    two.own("ann", {"queued": None, "gpus": 2})
    two.submit("ann", gpus=2)
    today = "quota 'Jobs submitted a day (UTC)': ann has 3 of 3; the next day begins in about"
    assert today in two.refusal("ann")
    two.harness.http.post(f"/v1/jobs/{gone}/cancel", headers=two.headers["ann"])
    two.harness.http.delete(f"/v1/jobs/{gone}", headers=two.headers["root"])
    assert today in two.refusal("ann")  # deleting a job gives nothing back
    two.submit("bob")  # whose quotas are apart
    two.own("ann", {"queued": 9, "per_day": 9, "kept": 2})
    assert two.refusal("ann") == (
        "quota 'Jobs kept': ann has 2 of 2; delete some that have ended, or ask an admin for more"
    )
    two.own("ann", {"queued": 9, "per_day": 9, "kept": 0})
    headers = YAML | two.headers["ann"] | {"Idempotency-Key": "k"}
    assert two.harness.http.post("/v1/jobs", content=RECIPE, headers=headers).status_code == 429
    account = two.harness.http.get("/v1/account", headers=two.headers["ann"]).json()
    assert account["usage"] == {"queued": 2, "running": 0, "gpus": 0, "disk": 0, "per_day": 3, "kept": 2}
    assert account["quotas"] == {"queued": 9, "running": None, "gpus": 1, "disk": None, "per_day": 9, "kept": 0}
    page = two.harness.http.get("/account", headers=two.headers["ann"] | {"Accept": "text/html"}).text
    assert "0, reached" in page


def test_every_way_to_start_work_passes_the_quotas(tmp_path: Path) -> None:
    """Submission, sweep, follow-up, retry, more samples, push and upload are refused alike, and leave nothing."""
    two = Two(tmp_path)
    failed, done = two.submit("ann", recipe(exit=1)), two.submit("ann", recipe(exit=3, verdict="not enough samples"))
    while two.states(failed, done) != ["failed", "gate_undecided"]:
        pass
    waiting = two.submit("ann")
    who = two.headers["ann"] | {"X-Hub-Token": "hf_secret"}
    files = [{"name": name, "bytes": 1, "sha256": "0" * 64} for name in FILES]
    text: dict[str, Any] = {"content": RECIPE, "headers": YAML}
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "submission": ("/v1/jobs", text),
        "sweep": ("/v1/sweeps", text | {"params": {"vary": "depth.remove=1,2"}}),
        "follow-up": (f"/v1/jobs/{done}/follow-ups", {"json": {"work": {"kind": "bench"}}}),
        "push": (f"/v1/jobs/{done}/push", {"json": {"repo_id": "org/x", "when": "always"}}),
        "upload": ("/v1/models/uploads", {"json": {"files": files}}),
        "retry": (f"/v1/jobs/{failed}/retry", {}),
        "more samples": (f"/v1/jobs/{done}/reevaluate", {"params": {"limit": 500}}),
    }
    before = usage_of(two.database, "ann")

    def refusals() -> dict[str, str]:
        answers = {
            way: two.harness.http.post(path, **body | {"headers": body.get("headers", {}) | who})
            for way, (path, body) in ways.items()
        }
        return {way: answer.json()["detail"] for way, answer in answers.items() if answer.status_code == 429}

    two.own("ann", {"per_day": 3})
    assert all("'Jobs submitted a day (UTC)': ann has 3 of 3" in said for said in refusals().values())
    assert refusals().keys() == ways.keys()
    assert "ann has 3 of 3, and 2 more were asked for" in refusals()["sweep"]
    two.own("ann", {"queued": 1})
    assert refusals().keys() == ways.keys() - {"upload"}  # which does not wait in the queue
    assert usage_of(two.database, "ann").model_copy(update={"per_day": 3}) == before
    assert not list((two.harness.settings.data_dir / "jobs").glob("*/hub-token"))
    two.own("ann", {"kept": 3})
    two.harness.http.post(f"/v1/jobs/{waiting}/cancel", headers=two.headers["ann"])
    assert refusals().keys() == {"submission", "sweep", "follow-up", "push"}  # the others add no job
    assert usage_of(two.database, "ann").per_day == before.per_day + 3  # a retry and more samples are submissions too


def test_quotas_at_the_start(tmp_path: Path) -> None:
    """A job waits for its owner's running jobs and GPUs, and holds nobody else up; a disabled owner's jobs wait."""
    two = Two(tmp_path, gpus=("0", "1", "2"), slots=3)
    two.own("ann", {"running": 2, "gpus": 1})
    text = recipe(pause=60)
    first, second, third = (two.submit("ann", text, gpus=gpus) for gpus in (1, 1, 0))
    other = two.submit("bob", text, gpus=2)
    last = two.submit("ann", text, gpus=0)
    assert two.states(first, second, third, other, last) == ["running", "queued", "running", "running", "queued"]
    two.harness.service.users.disable("bob")
    held = two.submit("root", text, gpus=0)
    waits = two.submit("root", text, gpus=0)
    with two.database.write() as connection:
        connection.execute("UPDATE jobs SET owner = 'bob' WHERE id = ?", (held,))
    assert two.states(held, waits, other) == ["queued", "running", "running"]
    two.end(first, third, other, waits, held, second, last)


def test_the_disk_of_a_users_jobs(tmp_path: Path) -> None:
    """Folders are measured when jobs change; above the quota the user's jobs neither start nor are taken."""
    two = Two(tmp_path)
    job = two.submit("ann")
    while two.states(job) != ["succeeded"]:
        pass
    settings, jobs = two.harness.settings, two.harness.service.jobs
    measure_jobs(settings, jobs)
    used = usage_of(two.database, "ann").disk
    assert used > 0
    waiting, free = two.submit("ann"), two.submit("bob", recipe(pause=60))
    two.own("ann", {"disk": used})
    assert two.states(waiting, free) == ["queued", "running"]
    assert "quota 'Disk space of jobs': ann uses" in (refused := two.refusal("ann"))
    assert "delete jobs or models, or ask an admin" in refused
    remove_products(settings, jobs, job=job)
    measure_jobs(settings, jobs)
    assert 0 < usage_of(two.database, "ann").disk < used
    two.end(free)
    assert two.states(waiting) == ["running"]
    two.end(waiting)


def test_users_take_turns(tmp_path: Path) -> None:
    """Many jobs of one user do not keep another's waiting; within a user the order of arrival holds."""
    two = Two(tmp_path)
    many = [two.submit("ann", recipe(n=number)) for number in range(2)]
    one = two.submit("bob")
    started: list[str] = []
    while len(started) < 3:
        states = two.states(*many, one)
        for job, state in zip([*many, one], states, strict=True):
            if state != "queued" and job not in started:
                started.append(job)
    assert started == [many[0], one, many[1]]
    two.end(*many, one)


def test_the_order_is_fair() -> None:
    """By priority; then no job before one of an owner with fewer, or with as many and an older start; none is lost."""
    chance = random.Random(7)
    for _ in range(50):
        jobs: Any = [
            SimpleNamespace(id=str(number), owner=chance.choice("abc"), priority=chance.choice((0, 0, 1)))
            for number in range(chance.randrange(12))
        ]
        running: Any = [SimpleNamespace(owner=chance.choice("abc")) for _ in range(chance.randrange(4))]
        waiting = sorted(jobs, key=lambda job: -job.priority)
        last = {owner: chance.randrange(9) for owner in "abc"}
        ordered = in_turn(waiting, running, last=last)
        assert sorted(job.id for job in ordered) == sorted(job.id for job in jobs)
        assert [job.priority for job in ordered] == [job.priority for job in waiting]
        for priority, owner in itertools.product((0, 1), "abc"):
            own = [job.id for job in ordered if (job.priority, job.owner) == (priority, owner)]
            assert own == [job.id for job in waiting if (job.priority, job.owner) == (priority, owner)]
        for priority in (0, 1):
            counts = {owner: sum(job.owner == owner for job in running) for owner in "abc"}
            turns = []
            for job in (job for job in ordered if job.priority == priority):
                turns.append((counts[job.owner], last[job.owner]))
                counts[job.owner] += 1
            assert turns == sorted(turns)


def test_wrong_quotas(tmp_path: Path) -> None:
    """Only whole numbers from 0, or null for no limit, and only quotas that there are."""
    two = Two(tmp_path)
    for wrong in ({"running": -1}, {"disk": 2**60}, {"gpus": 1.5}, {"more": 1}):
        answer = two.harness.http.put("/v1/users/ann/quotas", json=wrong, headers=two.headers["root"])
        assert answer.status_code == 422, wrong
    assert default_quotas(two.harness.settings).running is None
