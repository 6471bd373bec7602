"""Notifications at the end of a job: the outbox, signed webhooks, e-mail, and who may be called."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.notifying import deliver, end, make_due, states
from helpers.receivers import Hooks, Mailbox, hook_server, mail_server, make_certificate
from helpers.service import ServiceHarness, read_only, recipe

from llmprune.service.database.database import DatabaseUnavailable
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.jobs import store
from llmprune.service.jobs.job import Outcome
from llmprune.service.notifications import webhook
from llmprune.service.notifications.cipher import TargetCipher
from llmprune.service.notifications.outbox import Outbox
from llmprune.service.notifications.settings import NotificationSettings
from llmprune.service.notifications.targets import Target
from llmprune.service.notifications.webhook import DeliveryError
from llmprune.service.users.quotas import Quotas


@pytest.fixture(scope="module")
def hooks() -> Iterator[Hooks]:
    """An HTTP server on this machine."""
    with hook_server() as running:
        yield running


@pytest.fixture(scope="module")
def mailbox() -> Iterator[Mailbox]:
    """A mail server on this machine."""
    with mail_server() as running:
        yield running


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, mailbox: Mailbox) -> ServiceHarness:
    """A service that may call this machine and write to example.org."""
    settings = NotificationSettings(
        webhook_hosts=("127.0.0.1",),
        smtp=f"smtp+plain://127.0.0.1:{mailbox.port}",
        mail_from="llmprune@example.org",
        mail_domains=("example.org",),
        public_url="https://pruner.example.org/",
    )
    return ServiceHarness(tmp_path_factory.mktemp("notify"), notifications=settings)


@pytest.fixture(autouse=True)
def fresh(hooks: Hooks, mailbox: Mailbox) -> None:
    """Both servers begin each test empty and friendly."""
    hooks.got.clear()
    mailbox.got.clear()
    hooks.statuses, mailbox.refuse = [204], None


def test_a_finished_run_is_told_once_with_a_signature(harness: ServiceHarness, hooks: Hooks) -> None:
    """The body is the job's summary; the signature is that of the owner's secret, by the published convention."""
    url = f"http://127.0.0.1:{hooks.port}/hook?x=1"
    job = harness.submit(recipe(layers=1), headers={"X-Notify-URL": url})["id"]
    assert deliver(harness) == 0
    harness.until_ended(job)
    assert deliver(harness) == 1
    assert deliver(harness) == 0
    [(path, headers, body)] = hooks.got
    told = json.loads(body)
    assert (path, told["type"], told["data"]["id"], told["data"]["state"]) == (
        "/hook?x=1", "job.ended", job, "succeeded",
    )  # fmt: skip
    assert told["data"]["url"] == f"https://pruner.example.org/jobs/{job}"
    assert told["data"]["figures"]["layers"] == [4, 3]
    secret = harness.http.get("/v1/notifications").json()["secret"]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256)
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(expected).decode()}"
    shown = harness.http.get(f"/v1/jobs/{job}/notifications").json()
    assert [one["state"] for one in shown["deliveries"]] == ["delivered"]
    assert shown["deliveries"][0]["target"] == "127.0.0.1/…"  # the path may be a secret


def test_a_failed_try_is_repeated_with_the_same_id_after_a_restart(harness: ServiceHarness, hooks: Hooks) -> None:
    """Pauses grow, redirects are not followed, and after a day it is given up, which the page says."""
    job = harness.submit(recipe(), headers={"X-Notify-URL": f"http://127.0.0.1:{hooks.port}/"})["id"]
    end(harness, job, error=f"see {harness.settings.folder(job)}/run/x.log")
    hooks.statuses = [500, 307, 503]
    pauses = []
    for _ in range(3):
        make_due(harness)
        deliver(harness)
        [one] = harness.service.outbox.deliveries(job)
        pauses.append(round(one.due - time.time()))
    assert (one.state, one.tries) == ("pending", 3)
    assert pauses == pytest.approx([10, 30, 60], abs=2)
    assert len({headers["webhook-id"] for _, headers, _ in hooks.got}) == 1
    assert len({body for _, _, body in hooks.got}) == 1
    assert json.loads(hooks.got[0][2])["data"]["error"] == "see run/x.log"
    assert not [path for path, _, _ in hooks.got if path != "/"]
    make_due(harness, created=time.time() - 25 * 3600)
    deliver(harness)
    assert states(harness, job) == [("given up", 4)]
    assert "1 not delivered" in harness.http.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text


def test_nothing_is_sent_while_the_outbox_cannot_be_written(
    harness: ServiceHarness, hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the same notification would be sent in every round."""
    job = harness.submit(recipe(), headers={"X-Notify-URL": f"http://127.0.0.1:{hooks.port}/"})["id"]
    end(harness, job)
    with monkeypatch.context() as patch:
        read_only(patch, harness.service.database)
        with pytest.raises(DatabaseUnavailable):
            deliver(harness)
    assert (hooks.got, states(harness, job)) == ([], [("pending", 0)])
    deliver(harness)
    assert (len(hooks.got), states(harness, job)) == (1, [("delivered", 1)])


def test_a_receiver_that_wants_no_more_is_not_called_again(harness: ServiceHarness, hooks: Hooks) -> None:
    """410 ends it at once; so does a host that the operator no longer allows."""
    url = f"http://127.0.0.1:{hooks.port}/"
    job = harness.submit(recipe(), headers={"X-Notify-URL": url})["id"]
    end(harness, job)
    hooks.statuses = [410]
    deliver(harness)
    assert states(harness, job) == [("given up", 1)]
    with pytest.raises(DeliveryError) as refused:
        webhook.post(url, b"{}", headers={}, settings=NotificationSettings())
    assert refused.value.permanent
    assert len(hooks.got) == 1


def test_every_end_and_only_an_end_is_told(harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled job, a job that is given up, and each end after a retry; never one that is rolled back."""
    outbox, jobs = harness.service.outbox, harness.service.jobs
    header = {"X-Notify-Email": "ann@example.org"}
    queued, broken, retried = (harness.submit(recipe(), headers=header)["id"] for _ in range(3))
    jobs.cancel(queued)
    jobs.give_up(broken, "its row is damaged")
    end(harness, retried)
    jobs.retry(retried, quotas=Quotas())
    jobs.start(retried, [])
    jobs.queue_again(retried)
    end(harness, retried)
    assert [len(outbox.deliveries(job)) for job in (queued, broken, retried)] == [1, 1, 2]
    other = harness.submit(recipe(), headers=header)["id"]
    jobs.start(other, [])
    monkeypatch.setattr(store, "record_run_time", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jobs.end(other, Outcome("failed", 1, "x"), ran_seconds=1.0)
    assert harness.job(other)["state"] == "running"
    assert outbox.deliveries(other) == []
    make_due(harness, state="delivered")


def test_an_email_says_how_it_ended(harness: ServiceHarness, mailbox: Mailbox) -> None:
    """A name with signs of other scripts is no trouble; a refused address is given up."""
    job = harness.submit(recipe(), headers={"X-Notify-Email": "ann@example.org"}, name="größe 75 %")["id"]
    end(harness, job, error="it went wrong")
    deliver(harness)
    [(recipients, mail)] = mailbox.got
    text = mail.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert recipients == ["ann@example.org"]
    assert "größe 75 % is failed." in text.decode()
    assert f"https://pruner.example.org/jobs/{job}" in text.decode()
    assert "it went wrong" in text.decode()
    again = harness.submit(recipe(), headers={"X-Notify-Email": "ann@example.org"})["id"]
    end(harness, again)
    mailbox.refuse = "450 later"
    deliver(harness)
    assert states(harness, again) == [("pending", 1)]
    mailbox.refuse = "550 no such user"
    make_due(harness)
    deliver(harness)
    assert states(harness, again) == [("given up", 2)]


def test_tls_is_checked_for_hooks_and_mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that nobody has signed is refused; a trusted one is used, and the login follows STARTTLS."""
    certificate = make_certificate(tmp_path / "cert.pem")
    (tmp_path / "password").write_text("geheim\n")
    with hook_server(certificate) as hooks, mail_server(certificate, password="geheim") as mailbox:
        settings = NotificationSettings(
            webhook_hosts=("localhost",), smtp=f"smtp://ann@localhost:{mailbox.port}", mail_from="a@example.org",
            mail_domains=("example.org",), smtp_password_file=tmp_path / "password",
        )  # fmt: skip
        harness = ServiceHarness(tmp_path, notifications=settings)
        headers = {"X-Notify-URL": f"https://localhost:{hooks.port}/", "X-Notify-Email": "ann@example.org"}
        job = harness.submit(recipe(), headers=headers)["id"]
        end(harness, job)
        deliver(harness)
        assert states(harness, job) == [("pending", 1)] * 2
        assert all("certificate" in (one.error or "") for one in harness.service.outbox.deliveries(job))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        make_due(harness)
        deliver(harness)
        assert states(harness, job) == [("delivered", 2)] * 2
        assert (len(hooks.got), len(mailbox.got)) == (1, 1)
        assert hooks.got[0][1]["host"] == f"localhost:{hooks.port}"


def test_defaults_are_for_new_jobs_that_name_no_target(harness: ServiceHarness, hooks: Hooks) -> None:
    """They are kept by user; a test goes to them; a job may have other ones or none."""
    url = f"http://127.0.0.1:{hooks.port}/mine"
    saved = harness.http.put("/v1/notifications", json={"urls": [url, url], "emails": ["ann@example.org"]}).json()
    assert saved["targets"] == {"urls": [url], "emails": ["ann@example.org"]}
    assert harness.http.post("/v1/notifications/test").status_code == 202
    assert harness.http.post("/v1/notifications/test").status_code == 409
    deliver(harness)
    assert json.loads(hooks.got[0][2])["type"] == "test"
    by_default = harness.submit(recipe())["id"]
    own = harness.submit(recipe(), headers={"X-Notify-URL": f"http://127.0.0.1:{hooks.port}/own"})["id"]
    assert {one.target for one in harness.service.outbox.targets(by_default).targets} == {url, "ann@example.org"}
    assert len(harness.service.outbox.targets(own).targets) == 1
    form = {"urls": "", "emails": ""}
    assert harness.http.post(f"/jobs/{by_default}/notifications", data=form, follow_redirects=False).status_code == 303
    assert harness.service.outbox.targets(by_default).targets == ()
    wrong = harness.http.post("/notifications", data={"urls": "ftp://x", "emails": "bob@other.org"})
    assert wrong.status_code == 422
    assert "ftp://x" in wrong.text
    assert "only to addresses at example.org" in wrong.text
    harness.service.outbox.set_defaults("local", ())


def test_one_user_cannot_fill_the_outbox_or_the_mailbox_of_others(tmp_path: Path) -> None:
    """At most two deliveries of a user are under way at a time, and an hour has a limit of e-mail."""
    database = SqliteDatabase(tmp_path / "x.sqlite3")
    database.migrate()
    outbox = Outbox(database, TargetCipher(tmp_path))
    outbox.set_defaults("ann", [Target("email", f"{number}@example.org") for number in range(5)])
    outbox.set_defaults("bob", [Target("email", "bob@example.org")])
    for owner in ("ann", "bob"):
        outbox.send_test(owner)
    due = outbox.due(time.time(), limit=8)
    assert sorted(one.owner for one in due) == ["ann", "ann", "bob"]
    now = time.time()
    with database.write() as connection:
        rows = [(f"old{number}", "ann", "email", "x", "{}", "delivered", now, now, now) for number in range(60)]
        connection.executemany(
            "INSERT INTO outbox (id, owner, kind, target, body, state, created, due, ended) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
    assert [one.owner for one in outbox.due(now, limit=8)] == ["bob"]
    outbox.forget_old(now + 40 * 86_400)
    assert len(outbox.due(now + 40 * 86_400, limit=8)) == 3
