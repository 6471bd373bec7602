"""The model library: every result, with a stage, tags and notes that people give it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from typing import Any

from llmprune.service.database.database import Database, Row, Transaction
from llmprune.service.jobs.job import SUMMARY_COLUMNS, JobSummary, summary_of
from llmprune.service.jobs.library.model_rows import record_model
from llmprune.service.jobs.library.models import (
    Choices,
    HistoryEvent,
    Labels,
    Model,
    ModelPage,
    ModelQuery,
    Sort,
    checked_tags,
)
from llmprune.service.jobs.store import write_event
from llmprune.service.jobs.store_reads import Conflict, Term, first_row, placeholders

_BATCH = 500  # rows that are completed in one transaction
_MOST_CHOICES = 200
_MOST_LINKS = 50
_HISTORY = 50  # events


class NoSuchPage(Exception):
    """No page of a list has given this cursor."""


class Library:
    """Reads and labels the models of a service."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def page(self, query: ModelQuery) -> ModelPage:
        """Return the models of a query. Raises NoSuchPage for a cursor that no page gave."""
        terms = _terms(query)
        down = query.order == "desc"
        if query.after is not None:
            terms.append((f"({query.sort}, seq) {'<' if down else '>'} (?, ?)", _cursor_of(query.after, query.sort)))
        where = f"WHERE {' AND '.join(term for term, _ in terms)}" if terms else ""
        way = "DESC" if down else "ASC"
        rows = self.database.read(
            f"SELECT job, seq, {query.sort} AS key FROM models {where} ORDER BY {query.sort} {way}, seq {way} LIMIT ?",
            [*(value for _, values in terms for value in values), query.limit + 1],
        )
        last = rows[query.limit - 1] if len(rows) > query.limit else None
        following = _cursor(last["key"], last["seq"]) if last is not None else None
        return ModelPage(self._models([row["job"] for row in rows[: query.limit]]), following)

    def get(self, job: str) -> Model | None:
        """Return the model of a job; None where the job has no result."""
        found = self._models([job])
        return found[0] if found else None

    def labels(self, jobs: Sequence[str]) -> dict[str, Model]:
        """Return the models of these jobs that have a result, by job."""
        return {model.id: model for model in self._models(jobs)}

    def label(self, jobs: Sequence[str], labels: Labels, *, by: str) -> list[Model]:
        """Change the labels of models, all of them or none; write an event for each one that has changed.

        Raises Conflict and RecipeError.
        """
        with self.database.write() as connection:
            for job in jobs:
                write_labels(connection, job, labels=labels, by=by)
        return self._models(jobs)

    def history(self, job: str) -> list[HistoryEvent]:
        """Return the latest changes of a job's state and labels, the newest first."""
        sql = "SELECT at, kind, data FROM events WHERE job = ? AND kind <> 'progress' ORDER BY id DESC LIMIT ?"
        rows = self.database.read(sql, (job, _HISTORY))
        return [HistoryEvent(row["at"], row["kind"], json.loads(row["data"])) for row in rows]

    def choices(self, viewer: str | None) -> Choices:
        """Return the tags, bases and owners of the models that a viewer may see."""
        visible, values = _visible(viewer, "m.")
        tags = f"SELECT DISTINCT t.tag AS one FROM model_tags t JOIN models m ON m.job = t.job {_where(visible)}"
        return Choices(
            self._column(tags, values),
            self._column(f"SELECT DISTINCT m.base AS one FROM models m {_where(visible)}", values),
            self._column(f"SELECT DISTINCT m.owner AS one FROM models m {_where(visible)}", values),
        )

    def jobs_of_models(self, models: Sequence[str]) -> list[JobSummary]:
        """Return the jobs that prune one of these models, the newest first."""
        sql = f"SELECT {SUMMARY_COLUMNS} FROM jobs WHERE model IN ({placeholders(models)}) ORDER BY seq DESC LIMIT ?"
        return [summary_of(row) for row in self.database.read(sql, [*models, _MOST_LINKS])]

    def complete(self) -> None:
        """Add the results that have no row yet: those of a version without a library."""
        last = 0
        while True:
            with self.database.write() as connection:
                rows = connection.execute(
                    f"SELECT seq, {SUMMARY_COLUMNS} FROM jobs WHERE figures IS NOT NULL AND source IS NULL AND seq > ? "
                    "AND NOT EXISTS (SELECT 1 FROM models WHERE models.job = jobs.id) ORDER BY seq LIMIT ?",
                    (last, _BATCH),
                ).fetchall()
                for row in rows:
                    record_model(connection, summary_of(row), seq=row["seq"])
            if len(rows) < _BATCH:
                return
            last = rows[-1]["seq"]

    def _models(self, jobs: Sequence[str]) -> list[Model]:
        """Return the models of these jobs in their order; jobs without a result are left out."""
        if not jobs:
            return []
        marks = placeholders(jobs)
        summaries = {
            row["id"]: summary_of(row)
            for row in self.database.read(f"SELECT {SUMMARY_COLUMNS} FROM jobs WHERE id IN ({marks})", jobs)
        }
        sql = f"SELECT job, stage, tags, notes FROM models WHERE job IN ({marks})"
        labels = {row["job"]: row for row in self.database.read(sql, jobs)}
        return [_model(summaries[job], labels[job]) for job in jobs if job in summaries and job in labels]

    def _column(self, sql: str, values: Sequence[Any]) -> list[str]:
        rows = self.database.read(f"{sql} ORDER BY one LIMIT ?", [*values, _MOST_CHOICES])
        return [row["one"] for row in rows]


def write_labels(connection: Transaction, job: str, *, labels: Labels, by: str) -> None:
    """Change the labels of a model within a transaction, and write an event where one has changed.

    Raises Conflict and RecipeError.
    """
    row = first_row(connection, "SELECT stage, tags, notes FROM models WHERE job = ?", job)
    if row is None:
        raise Conflict(f"job {job} has no result to label; label it when it has ended with one")
    given = row["tags"].split() if labels.tags is None else checked_tags(labels.tags)
    tags = checked_tags([*(set(given) - set(checked_tags(labels.remove_tags))), *labels.add_tags])
    stage = labels.stage or row["stage"]
    notes = row["notes"] if labels.notes is None else labels.notes.strip()
    changes = _changes(row, stage=stage, tags=tags, notes=notes)
    if not changes:
        return
    words = f"{' '.join(tags)} {notes}".lower()
    connection.execute(
        "UPDATE models SET stage = ?, tags = ?, notes = ?, label_words = ? WHERE job = ?",
        (stage, " ".join(tags), notes, words, job),
    )
    connection.execute("DELETE FROM model_tags WHERE job = ?", (job,))
    for tag in tags:
        connection.execute("INSERT INTO model_tags (tag, job) VALUES (?, ?)", (tag, job))
    write_event(connection, job, kind="labels", by=by, changes=changes)


def _model(job: JobSummary, row: Row) -> Model:
    return Model(
        id=job.id,
        name=job.name,
        owner=job.owner,
        base=job.model,
        state=job.state,
        stage=row["stage"],
        tags=tuple(row["tags"].split()),
        notes=row["notes"],
        figures=job.figures,
        uploaded=job.uploaded,
        cleaned=job.cleaned,
        shared=job.shared,
        finished=job.finished,
    )


def _terms(query: ModelQuery) -> list[Term]:
    """Return the conditions of a query."""
    visible, values = _visible(query.viewer)
    terms: list[Term] = [(visible, values)] if visible else []
    equal = {"stage": query.stage, "base": query.base, "owner": query.owner}
    terms += [(f"{name} = ?", [value]) for name, value in equal.items() if value is not None]
    if query.tag is not None:
        terms.append(("job IN (SELECT job FROM model_tags WHERE tag = ?)", [query.tag.lower()]))
    for word in query.search.lower().split()[:8]:
        part = "%" + re.sub(r"([\\%_])", r"\\\1", word) + "%"
        terms.append((r"(words LIKE ? ESCAPE '\' OR label_words LIKE ? ESCAPE '\')", [part, part]))
    return terms


def _visible(viewer: str | None, prefix: str = "") -> tuple[str, list[Any]]:
    """Return the condition for the models that a viewer may see; an empty one for all of them."""
    if viewer is None:
        return "", []
    return f"({prefix}owner = ? OR {prefix}shared = 1)", [viewer]


def _where(term: str) -> str:
    return f"WHERE {term}" if term else ""


def _changes(row: Row, *, stage: str, tags: Sequence[str], notes: str) -> dict[str, Any]:
    """Describe what differs from a row, for the event."""
    old = row["tags"].split()
    changes: dict[str, Any] = {}
    if stage != row["stage"]:
        changes["stage"] = stage
    if added := [tag for tag in tags if tag not in old]:
        changes["added"] = added
    if removed := [tag for tag in old if tag not in tags]:
        changes["removed"] = removed
    if notes != row["notes"]:
        changes["notes"] = "changed" if notes else "removed"
    return changes


def _cursor(key: str | float, seq: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([key, seq]).encode()).decode().rstrip("=")


def _cursor_of(text: str, sort: Sort) -> list[Any]:
    """Return the sort key and the number of a cursor. Raises NoSuchPage."""
    is_text = sort in ("name", "base", "stage", "owner")
    try:
        key, seq = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if isinstance(key, str) is not is_text or not isinstance(key, str | int | float) or type(seq) is not int:
            raise ValueError("other types")
        if abs(seq) > 2**62 or (isinstance(key, int) and abs(key) > 2**62):
            raise ValueError("too large")
    except (ValueError, TypeError, RecursionError):
        raise NoSuchPage("after: give the field next of the page before, with the same sort") from None
    return [key, seq]
