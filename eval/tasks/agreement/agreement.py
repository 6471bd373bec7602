"""Documents of the task ``llmprune_agreement``: which verb agrees with the subject?

    The keys to the cabinet  ->  are | is

A smoke test, not a benchmark. It is made of templates, needs no download, and
takes a 135M model seconds on a CPU. It tells a language model from a broken one
(chance is 0.5) and shows gross damage of pruning before a real task is run. Do
not compare models by it, and report no figure of it as a result.

Every document has another noun between subject and verb: in half of them of the
other number, so that the nearest noun misleads. Singular and plural subjects, and
the place of the right verb, are balanced too. Nothing is random: all runs see the
same documents.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

SUBJECTS = (
    ("key", "keys"),
    ("label", "labels"),
    ("picture", "pictures"),
    ("author", "authors"),
    ("door", "doors"),
    ("teacher", "teachers"),
    ("letter", "letters"),
    ("report", "reports"),
    ("child", "children"),
    ("manager", "managers"),
)
PLACES = (
    ("cabinet", "cabinets"),
    ("wall", "walls"),
    ("house", "houses"),
    ("window", "windows"),
    ("office", "offices"),
    ("bottle", "bottles"),
    ("garden", "gardens"),
)
PEOPLE = (
    ("student", "students"),
    ("doctor", "doctors"),
    ("farmer", "farmers"),
    ("lawyer", "lawyers"),
    ("neighbor", "neighbors"),
    ("guard", "guards"),
    ("painter", "painters"),
)
TEMPLATES = (
    "The {subject} near the {place}",
    "The {subject} behind the {place} near the {second_place}",
    "The {subject} that the {person} liked",
    "The {subject} the {person} saw",
    "The {subject} that the {person} by the {place} saw",
)
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("seems", "seem"), ("looks", "look"))


def documents(**_settings: Any) -> dict[str, Dataset]:
    """The task's only split, ``test``: 200 documents; lm-eval's settings are not needed."""
    return {"test": Dataset.from_list([_document(index) for index in range(200)])}


def _document(index: int) -> dict[str, Any]:
    """One of the combinations; ``index`` counts number, answer, number of the other nouns, template, subject."""
    plural, answer, between, rest = index % 2, index // 2 % 2, index // 4 % 2, index // 8
    template = rest % len(TEMPLATES)
    subject = (rest // len(TEMPLATES) * 2 + template) % len(SUBJECTS)
    step = subject + 3 * template + 5 * answer
    text = TEMPLATES[template].format(
        subject=SUBJECTS[subject][plural],
        place=PLACES[step % len(PLACES)][between],
        second_place=PLACES[(step + 4) % len(PLACES)][between],
        person=PEOPLE[step % len(PEOPLE)][between],
    )
    verbs = VERBS[(subject + template + answer) % len(VERBS)]
    choices = [verbs[plural], verbs[1 - plural]]
    return {"subject": text, "verbs": choices[::-1] if answer else choices, "correct": answer}
