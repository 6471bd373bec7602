"""Targets of notifications: encrypted in the database, masked on pages, read by nobody else; and signing secrets."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from helpers.notifying import deliver, end
from helpers.old_schemas import FOLDER, HOOK
from helpers.service import ServiceHarness, recipe, settings_in

from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.notifications.cipher import TargetCipher
from llmprune.service.notifications.key_file import KEY, OLD_KEY, secret_of
from llmprune.service.notifications.outbox import Outbox
from llmprune.service.notifications.settings import NotificationSettings
from llmprune.service.upgrade import bring_up_to_date
from llmprune.service.users.deleted_users import delete_user

URL = "https://hooks.example.org/services/T0KEN"
MAIL = "Ann.Other@example.org"
SETTINGS = NotificationSettings(smtp="smtp+plain://127.0.0.1:9", mail_from="a@b.c", mail_domains=("example.org",))
PAGE = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service on SQLite."""
    return ServiceHarness(tmp_path_factory.mktemp("secrets"), database_url=None, notifications=SETTINGS)


@pytest.fixture
def harness(service: ServiceHarness) -> ServiceHarness:
    """The service, whose new jobs tell a webhook and write an e-mail."""
    service.http.put("/v1/notifications", json={"urls": [URL], "emails": [MAIL]})
    return service


def stored(folder: Path) -> bytes:
    """Return the bytes of all files of a job table."""
    return b"".join(path.read_bytes() for path in folder.glob("service.sqlite3*"))


def test_a_copy_of_the_database_gives_no_target_away(harness: ServiceHarness) -> None:
    """Neither defaults, targets of jobs nor what is to be sent have a URL or an address in clear."""
    headers = {"X-Notify-URL": URL + "-of-a-job", "X-Notify-Email": MAIL}
    job = harness.submit(recipe(), headers=headers)["id"]
    by_default = harness.submit(recipe(n=1))["id"]
    end(harness, job)
    end(harness, by_default)
    outbox = harness.service.outbox
    assert {one.target for one in outbox.targets(by_default).targets} == {URL, MAIL}
    assert {one.target for one in outbox.deliveries(job)} == {"hooks.example.org/…", "A…@example.org"}
    content = stored(harness.settings.data_dir)
    assert [part for part in (b"T0KEN", b"hooks.example", b"Other@example") if part in content] == []
    assert job.encode() in content


def test_targets_of_an_earlier_version_are_encrypted(tmp_path: Path) -> None:
    """They are read as before, and nothing of them is left in the file."""
    settings = settings_in(tmp_path, database_url=None)
    settings.prepare()
    with closing(sqlite3.connect(settings.database)) as connection:
        connection.executescript((FOLDER / "0020.sql").read_text(encoding="utf-8"))
        connection.execute("INSERT INTO notify_defaults VALUES ('ann', 'email', ?)", (MAIL,))
        connection.commit()
    assert HOOK.encode() in stored(settings.data_dir)
    database = SqliteDatabase(settings.database)
    bring_up_to_date(database, settings)
    saved = Outbox(database, TargetCipher(settings.data_dir)).defaults("ann").targets
    assert {one.target for one in saved} == {HOOK, MAIL}
    rows = database.read("SELECT target FROM notify_defaults UNION SELECT target FROM outbox")
    assert not [row for row in rows if "example.org" in row["target"]]
    assert b"secret-of-a-hook" not in stored(settings.data_dir)
    assert MAIL.encode() not in stored(settings.data_dir)
    bring_up_to_date(database, settings)  # again, and nothing changes
    assert rows == database.read("SELECT target FROM notify_defaults UNION SELECT target FROM outbox")


def test_the_key_can_be_changed(harness: ServiceHarness) -> None:
    """What the key before encrypted is read at once, and encrypted anew at the next start, which deletes that key."""
    folder, outbox = harness.settings.data_dir, harness.service.outbox
    before = secret_of(folder, "local", account="")
    (folder / KEY).rename(folder / OLD_KEY)
    assert {one.target for one in outbox.defaults("local").targets} == {URL, MAIL}
    bring_up_to_date(harness.service.database, harness.settings)
    assert not (folder / OLD_KEY).exists()
    assert {one.target for one in outbox.defaults("local").targets} == {URL, MAIL}
    assert secret_of(folder, "local", account="") != before


def test_a_lost_key_is_said(harness: ServiceHarness, caplog: pytest.LogCaptureFixture) -> None:
    """The log at the start, the page, the API and the delivery say that the targets have to be saved again."""
    with harness.service.database.write() as connection:
        connection.execute("DELETE FROM outbox")  # of other tests
    job = harness.submit(recipe())["id"]
    end(harness, job)
    (harness.settings.data_dir / KEY).unlink()
    bring_up_to_date(harness.service.database, harness.settings)
    assert "saved notification targets cannot be read" in caplog.text
    shown = harness.http.get("/v1/notifications").json()
    assert (shown["targets"], shown["unreadable"]) == ({"urls": [], "emails": []}, 2)
    for path in ("/notifications", f"/jobs/{job}"):
        assert "2 targets cannot be read any more" in harness.http.get(path, headers=PAGE).text
    assert deliver(harness) == 2
    sent = harness.http.get(f"/v1/jobs/{job}/notifications").json()["deliveries"]
    assert {(one["state"], one["target"]) for one in sent} == {("given up", "a webhook"), ("given up", "an address")}
    assert all("webhook-key was lost or replaced; save it again" in one["error"] for one in sent)
    harness.http.put("/v1/notifications", json={"urls": [URL]})
    assert harness.http.get("/v1/notifications").json()["unreadable"] == 0


def test_pages_mask_targets(harness: ServiceHarness) -> None:
    """A masked line that is sent back keeps its target; one that is not saved is refused with the remedy."""
    others = {"urls": "https://hooks.example.org/services/0THER", "emails": "bob@example.org"}
    outbox, job = harness.service.outbox, harness.submit(recipe())["id"]
    saved = outbox.defaults("local")
    masks = {"urls": saved.masked("webhook")[0], "emails": saved.masked("email")[0]}
    assert masks["urls"].startswith("https://hooks.example.org/…")
    assert re.fullmatch(r"A…[0-9a-f]{6}@example\.org", masks["emails"])
    for path in ("/notifications", f"/jobs/{job}"):
        text = harness.http.get(path, headers=PAGE).text
        assert all(mask in text for mask in masks.values()), path
        assert ("T0KEN" in text, "Other@" in text) == (False, False), path
    lines = {name: f"{mask}\n{others[name]}" for name, mask in masks.items()}
    for path, found in (
        ("/notifications", lambda: outbox.defaults("local")),
        (f"/jobs/{job}/notifications", lambda: outbox.targets(job)),
    ):
        answer = harness.http.post(path, data=lines, follow_redirects=False)
        assert answer.status_code == 303, answer.text
        assert {one.target for one in found().targets} == {URL, MAIL, *others.values()}
    for name, whole in (("urls", "give the whole URL"), ("emails", "give the whole address")):
        form = lines | {name: masks[name].replace("…", "…zz")}
        refused = harness.http.post("/notifications", data=form, headers=PAGE)
        assert (refused.status_code, whole in refused.text) == (422, True)
    assert len(outbox.defaults("local").targets) == 4


def test_a_user_who_is_made_again_has_another_secret(tmp_path: Path) -> None:
    """Those of before keep theirs; what a job's end has queued is signed with the secret of its owner of then."""
    harness = ServiceHarness(tmp_path)
    tokens, folder = harness.service.tokens, harness.settings.data_dir
    tokens.create("root", "admin")

    def ann() -> tuple[dict[str, str], str]:
        headers = {"Authorization": f"Bearer {tokens.create('ann', 'user')}"}
        return headers, harness.http.get("/v1/notifications", headers=headers).json()["secret"]

    headers, first = ann()
    job = harness.submit(recipe(), headers=headers | {"X-Notify-URL": URL})["id"]
    end(harness, job)
    harness.http.put("/v1/notifications", headers=headers, json={"urls": [URL]})
    assert harness.http.post("/v1/notifications/test", headers=headers).status_code == 202
    delete_user(harness.service.database, "ann", hand_over_to="root")
    headers, second = ann()
    assert first != second
    assert harness.http.get("/v1/notifications", headers=headers).json()["tests"] == []
    [pending] = harness.service.outbox.due(time.time(), limit=9)
    assert secret_of(folder, pending.owner, account=pending.account) == first
    with harness.service.database.write() as connection:
        connection.execute("UPDATE users SET account = '' WHERE name = 'ann'")  # as after the migration
    of_before = harness.http.get("/v1/notifications", headers=headers).json()["secret"]
    assert of_before == secret_of(folder, "ann", account="")


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
    account = harness.service.users.account("ann")
    assert secret_of(harness.settings.data_dir, "ann", account=account) in secrets
    assert (harness.settings.data_dir / "webhook-key").stat().st_mode & 0o077 == 0
    many = {"urls": [f"https://example.org/{number}" for number in range(5)], "emails": []}
    assert harness.http.put(address, headers=ann, json=many).status_code == 200
    six = many | {"emails": ["a@example.org"]}
    assert harness.http.put(address, headers=ann, json=six).status_code == 422
