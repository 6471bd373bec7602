"""Secrets of webhooks: encrypted in the database, masked on pages, read by nobody else."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from helpers.notifying import deliver, end
from helpers.old_schemas import FOLDER, HOOK
from helpers.service import ServiceHarness, recipe, settings_in

from llmprune.service.jobs.sqlite import SqliteDatabase
from llmprune.service.notifications.cipher import TargetCipher
from llmprune.service.notifications.key_file import KEY, OLD_KEY, secret_of
from llmprune.service.notifications.outbox import Outbox
from llmprune.service.upgrade import bring_up_to_date

URL = "https://hooks.example.org/services/T0KEN"
PAGE = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service on SQLite."""
    return ServiceHarness(tmp_path_factory.mktemp("secrets"), database_url=None)


@pytest.fixture
def harness(service: ServiceHarness) -> ServiceHarness:
    """The service, whose new jobs tell a webhook."""
    service.http.put("/v1/notifications", json={"urls": [URL]})
    return service


def stored(folder: Path) -> bytes:
    """Return the bytes of all files of a job table."""
    return b"".join(path.read_bytes() for path in folder.glob("service.sqlite3*"))


def test_a_copy_of_the_database_gives_no_webhook_away(harness: ServiceHarness) -> None:
    """Neither defaults, targets of jobs nor what is to be sent have a URL in clear."""
    job = harness.submit(recipe(), headers={"X-Notify-URL": URL + "-of-a-job"})["id"]
    by_default = harness.submit(recipe(n=1))["id"]
    end(harness, job)
    end(harness, by_default)
    outbox = harness.service.outbox
    assert [one.target for one in outbox.targets(by_default).targets] == [URL]
    assert {one.target for one in outbox.deliveries(job)} == {"hooks.example.org/…"}
    content = stored(harness.settings.data_dir)
    assert (b"T0KEN" in content, b"hooks.example" in content, job.encode() in content) == (False, False, True)


def test_webhooks_of_an_earlier_version_are_encrypted(tmp_path: Path) -> None:
    """They are read as before, and nothing of them is left in the file."""
    settings = settings_in(tmp_path, database_url=None)
    settings.prepare()
    with closing(sqlite3.connect(settings.database)) as connection:
        connection.executescript((FOLDER / "0020.sql").read_text(encoding="utf-8"))
    assert HOOK.encode() in stored(settings.data_dir)
    database = SqliteDatabase(settings.database)
    bring_up_to_date(database, settings)
    assert [one.target for one in Outbox(database, TargetCipher(settings.data_dir)).defaults("ann").targets] == [HOOK]
    rows = database.read("SELECT target FROM notify_defaults UNION SELECT target FROM outbox")
    assert not [row for row in rows if "example.org" in row["target"]]
    assert b"secret-of-a-hook" not in stored(settings.data_dir)
    bring_up_to_date(database, settings)  # again, and nothing changes
    assert rows == database.read("SELECT target FROM notify_defaults UNION SELECT target FROM outbox")


def test_the_key_can_be_changed(harness: ServiceHarness) -> None:
    """What the key before encrypted is read at once, and encrypted anew at the next start, which deletes that key."""
    folder, outbox = harness.settings.data_dir, harness.service.outbox
    before = secret_of(folder, "local")
    (folder / KEY).rename(folder / OLD_KEY)
    assert [one.target for one in outbox.defaults("local").targets] == [URL]
    bring_up_to_date(harness.service.database, harness.settings)
    assert not (folder / OLD_KEY).exists()
    assert [one.target for one in outbox.defaults("local").targets] == [URL]
    assert secret_of(folder, "local") != before


def test_a_lost_key_is_said(harness: ServiceHarness, caplog: pytest.LogCaptureFixture) -> None:
    """The log at the start, the page, the API and the delivery say that the webhook has to be saved again."""
    with harness.service.database.write() as connection:
        connection.execute("DELETE FROM outbox")  # of other tests
    job = harness.submit(recipe())["id"]
    end(harness, job)
    (harness.settings.data_dir / KEY).unlink()
    bring_up_to_date(harness.service.database, harness.settings)
    assert "saved webhooks cannot be read" in caplog.text
    shown = harness.http.get("/v1/notifications").json()
    assert (shown["targets"]["urls"], shown["unreadable"]) == ([], 1)
    for path in ("/notifications", f"/jobs/{job}"):
        assert "1 webhook cannot be read any more" in harness.http.get(path, headers=PAGE).text
    assert deliver(harness) == 1
    [delivery] = harness.http.get(f"/v1/jobs/{job}/notifications").json()["deliveries"]
    assert (delivery["state"], delivery["target"]) == ("given up", "a webhook")
    assert "webhook-key was lost or replaced; save the webhook again" in delivery["error"]
    harness.http.put("/v1/notifications", json={"urls": [URL]})
    assert harness.http.get("/v1/notifications").json()["unreadable"] == 0


def test_pages_mask_webhooks(harness: ServiceHarness) -> None:
    """A masked line that is sent back keeps its webhook; one that is not saved is refused with the remedy."""
    other = "https://hooks.example.org/services/0THER"
    outbox, job = harness.service.outbox, harness.submit(recipe())["id"]
    [mask] = outbox.defaults("local").masked_urls
    assert mask.startswith("https://hooks.example.org/…")
    for path in ("/notifications", f"/jobs/{job}"):
        text = harness.http.get(path, headers=PAGE).text
        assert (mask in text, "T0KEN" in text) == (True, False), path
    for path, saved in (
        ("/notifications", lambda: outbox.defaults("local")),
        (f"/jobs/{job}/notifications", lambda: outbox.targets(job)),
    ):
        answer = harness.http.post(path, data={"urls": f"{mask}\n{other}"}, follow_redirects=False)
        assert answer.status_code == 303, answer.text
        assert sorted(one.target for one in saved().targets) == sorted([URL, other])
    refused = harness.http.post("/notifications", data={"urls": mask[:-2] + "zz"}, headers=PAGE)
    assert (refused.status_code, "give the whole URL" in refused.text) == (422, True)
    assert len(outbox.defaults("local").targets) == 2


def test_others_neither_see_nor_change_the_targets_of_a_job(tmp_path: Path) -> None:
    """A reader of a shared job does not learn who is told; each user has a secret of their own."""
    harness = ServiceHarness(tmp_path)
    ann, bob = ({"Authorization": f"Bearer {harness.service.tokens.create(name, 'user')}"} for name in ("ann", "bob"))
    url = {"X-Notify-URL": "https://example.org/secret"}
    job = harness.submit(recipe(), headers=ann | url, shared=True)["id"]
    private = harness.submit(recipe(), headers=ann)["id"]
    address = f"/v1/jobs/{job}/notifications"
    assert harness.http.get(address, headers=ann).json()["targets"]["urls"] == ["https://example.org/secret"]
    assert harness.http.get(address, headers=bob).status_code == 403
    assert harness.http.put(address, headers=bob, json={}).status_code == 403
    assert harness.http.get(f"/v1/jobs/{private}/notifications", headers=bob).status_code == 404
    assert "secret" not in harness.http.get(f"/jobs/{job}", headers=bob | {"Accept": "text/html"}).text
    secrets = {harness.http.get("/v1/notifications", headers=who).json()["secret"] for who in (ann, bob)}
    assert len(secrets) == 2
    assert secret_of(harness.settings.data_dir, "ann") in secrets
    assert (harness.settings.data_dir / "webhook-key").stat().st_mode & 0o077 == 0
    many = {"urls": [f"https://example.org/{number}" for number in range(5)], "emails": []}
    assert harness.http.put(address, headers=ann, json=many).status_code == 200
    six = many | {"emails": ["a@example.org"]}
    assert harness.http.put(address, headers=ann, json=six).status_code == 422
