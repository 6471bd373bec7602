"""The folder of one run: its products, each under a fingerprint of what it came from.

A product that is there with the right fingerprint is not made again. The journal
``run.json`` records the recipe, fingerprints and what each product cost. A finished model
is only replaced by another one that is finished (``replacing``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.errors import LLMPruneError, OutputError
from llmprune.common.files import folder_size, write_text
from llmprune.results.replacing import (
    NEXT,
    complete_swap,
    has_model,
    is_swapping,
    refuse_other_recipe,
    remove,
    take_over,
)
from llmprune.results.schema import Step

logger = logging.getLogger(__name__)

T = TypeVar("T")

JOURNAL = "run.json"
LOCK = ".lock"
TRAIL = "dense.partial"  # what pass 1 leaves for pass 2
TASKS = "tasks"  # the pruned model's results, a file for each finished task
_FORMAT = 2
_PRODUCTS = (
    "recipe.yaml", "plan.json", "scores.safetensors", "cut.json", "cut.safetensors", "calibration-check.json",
    "pruning.json", "evaluation.json", "report.json", "report.html", "published.json", "card", "model", "model.partial",
    TRAIL, TASKS,
)  # fmt: skip


class RunFolder:
    """One run's folder, held by one run at a time; of its processes the first reads and writes."""

    def __init__(self, home: Path, lock: IO[str] | None, *, inside: str = "") -> None:
        self.home = home  # the folder that the user named
        self.path = home / inside  # where products are: in it, or beside those of a finished run that they replace
        self.steps: list[Step] = []
        self._lock = lock
        self._recipe: dict[str, Any] = {}
        self._origin = ""
        self._journal = self._read_journal()

    @classmethod
    def open(
        cls, path: Path, fresh: bool = False, *, model: str | None = None, recipe: Mapping[str, Any] | None = None
    ) -> RunFolder:
        """Make or continue a run folder. ``recipe``: the values that decide what the model is; None: only to read.

        ``fresh`` throws an unfinished run away. A finished one stays until the new run has a model.
        Raises OutputError where the path is a file, holds something else or the finished run of another recipe, is in
        use, or where its result would replace ``model``, the model that the run reads.
        """
        if not is_first_process():
            return cls(path, None)
        try:
            _refuse_foreign(path)
            _refuse_own_result(path, model)
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            try:
                complete_swap(path, (*_PRODUCTS, JOURNAL))
                return cls._choose(path, lock, fresh=fresh, recipe=recipe)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise OutputError(f"the output folder {path} cannot be used: {error}; choose another --output") from error

    @classmethod
    def open_finished(cls, path: Path) -> RunFolder:
        """Open the folder of a run for more work on its result. Raises OutputError where it is no run's, or in use."""
        if is_first_process() and not _is_run(path):
            raise OutputError(f"{path} is no llmprune run; give the folder that llmprune run wrote to")
        return cls.open(path)

    @classmethod
    def _choose(cls, home: Path, lock: IO[str], *, fresh: bool, recipe: Mapping[str, Any] | None) -> RunFolder:
        """The run in the folder, or the one beside it."""
        if fresh:
            remove(home / NEXT)
            if has_model(home):
                return cls(home, lock, inside=NEXT)
            _clear(home)
        if recipe is not None and (home / NEXT / JOURNAL).is_file():
            begun = cls(home, lock, inside=NEXT)
            if begun._recipe == recipe:
                return begun
            logger.warning(
                "%s: a run with --fresh of another recipe was not finished; delete it to free its space", begun.path
            )
        found = cls(home, lock)
        if recipe is not None and has_model(home):
            refuse_other_recipe(home, found._recipe, wanted=recipe, places=False)
        return found

    def begin(self, recipe: Mapping[str, Any], origin: str) -> None:
        """Note what the run comes from, before its first product.

        ``origin``: fingerprint of base model, text and code. Where the finished model is from others, its replacement
        is made beside it. Raises OutputError where it is of another recipe.
        """
        if is_first_process():
            if self.path == self.home and has_model(self.home) and self._origin != origin:
                refuse_other_recipe(self.home, self._recipe, wanted=recipe, places=True)
                self.path = self.home / NEXT
                self._journal = self._read_journal()
            self.path.mkdir(exist_ok=True)
            self._recipe, self._origin = dict(recipe), origin
            self._write_journal()
        self.path = broadcast_from_first(self.path)

    def take_over(self) -> None:
        """Put this run in the place of the finished one beside which it was made."""
        if is_first_process() and self.path != self.home:
            take_over(self.home, (*_PRODUCTS, JOURNAL))
        self.path = broadcast_from_first(self.home)

    def close(self) -> None:
        """Let other processes use the folder; a replacement of a finished run that has no product yet goes."""
        if self._lock is not None:
            if self.path != self.home and not self._journal and not (self.path / "model.partial").exists():
                remove(self.path)
            self._lock.close()

    def produce(
        self,
        name: str,
        fingerprint: str,
        *,
        file: str,
        load: Callable[[Path], T],
        make: Callable[[Path], T],
        together: bool = False,
    ) -> T:
        """The product ``file``: loaded where it is there under this fingerprint, else made (and written) now.

        Of several processes the first decides and loads, and makes it, unless all make it ``together``; all
        get its value. One that is there and cannot be read is made again, unless ``load`` has an error for people.
        """
        path = self.path / file
        reused, value = broadcast_from_first(
            self._reuse(name, fingerprint, path=path, load=load) if is_first_process() else (False, None)
        )
        if reused and value is not None:
            return value
        if is_first_process() and name in self._journal:  # a stop must not leave it under the old fingerprint
            del self._journal[name]
            self._write_journal()
        before = len(self.steps)
        if together or is_first_process():
            value = make(path)
        value = broadcast_from_first(value)
        assert value is not None, "make returns the product"
        if is_first_process():
            made = [step.model_dump() for step in self.steps[before:]]
            self._journal[name] = {"fingerprint": fingerprint, "steps": made}
            self._write_journal()
        return value

    def _reuse(self, name: str, fingerprint: str, *, path: Path, load: Callable[[Path], T]) -> tuple[bool, T | None]:
        noted = self._journal.get(name, {})
        if noted.get("fingerprint") != fingerprint or not path.exists():
            return False, None
        try:
            value = load(path)
        except LLMPruneError:
            raise
        except Exception as error:  # pydantic's, json's and safetensors' have no base in common
            logger.warning("%s is damaged (%s): it is made again", path, error)
            return False, None
        self.steps += [Step(**step | {"reused": True}) for step in noted["steps"]]
        return True, value

    def forget(self, name: str) -> None:
        """Have the next run make a product again, for its file is about to hold something else."""
        if is_first_process() and self._journal.pop(name, None) is not None:
            self._write_journal()

    def fingerprints(self) -> dict[str, str]:
        """What each product that is there came from."""
        return {name: str(noted["fingerprint"]) for name, noted in self._journal.items()}

    def write(self, file: str, text: str) -> Path:
        """Write a text file whole or not at all; only the first process does."""
        path = self.path / file
        if is_first_process():
            write_text(path, text)
        return path

    def _read_journal(self) -> dict[str, dict[str, Any]]:
        path = self.path / JOURNAL
        if self._lock is None or not path.is_file():
            return {}
        try:
            journal = json.loads(path.read_text(encoding="utf-8"))
            if journal["format"] != _FORMAT:
                raise ValueError(f"format {journal['format']}")
            self._recipe, self._origin = dict(journal["recipe"]), str(journal["origin"])
            products: dict[str, dict[str, Any]] = journal["products"]
            return products
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} cannot be read ({error}); run with --fresh to start over") from error

    def _write_journal(self) -> None:
        journal = {"format": _FORMAT, "recipe": self._recipe, "origin": self._origin, "products": self._journal}
        self.write(JOURNAL, json.dumps(journal, indent=1) + "\n")


def bytes_at_hand(home: Path, *, fresh: bool) -> int:
    """Bytes of disk that a run here need not find free: those of its result that are written, or those it clears."""
    if not fresh:
        return sum(folder_size(place / name) for place in (home, home / NEXT) for name in ("model", "model.partial"))
    return folder_size(home / NEXT) + (0 if has_model(home) else sum(folder_size(home / name) for name in _PRODUCTS))


def fingerprint(*parts: object) -> str:
    """SHA-256 of the parts' texts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """SHA-256 of llmprune's own modules: what other code made is not taken for what this code makes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def file_fingerprint(*paths: Path) -> str:
    """SHA-256 of the contents of those files that are there."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"the output {path} is a file; give a folder")
    filled = path.is_dir() and any(entry.name != LOCK for entry in path.iterdir())
    if filled and not _is_run(path):
        raise OutputError(
            f"the output folder {path} is not empty and is no llmprune run; give a new or an empty folder"
        )


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's: a kill may have left its journal beside it."""
    return (path / JOURNAL).is_file() or is_swapping(path)


def _refuse_own_result(path: Path, model: str | None) -> None:
    if model is not None and Path(model).expanduser().resolve() == (path / "model").resolve():
        raise OutputError(f"the run reads {model} and would replace it with its own result; choose another --output")


def _lock(path: Path) -> IO[str]:
    lock = (path / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise OutputError(f"another run is using {path}; wait for it, or choose another --output") from error
    return lock


def _clear(path: Path) -> None:
    for name in (*_PRODUCTS, JOURNAL):  # the journal last: until then the folder is known as a run's
        remove(path / name)
