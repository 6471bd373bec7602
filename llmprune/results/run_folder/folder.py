"""Folder of one run with its products, each identified by a fingerprint of its inputs.

A product that exists with the right fingerprint is reused. The journal ``run.json`` records the recipe, the
fingerprints and the cost of each product. Only a finished model replaces a finished model (``replacing``).
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.errors import LLMPruneError, OutputError
from llmprune.common.files import folder_size, write_text
from llmprune.common.progress import report_reused
from llmprune.results.figures.base import Figures
from llmprune.results.figures.provenance import Step
from llmprune.results.run_folder.output_path import is_run, require_run_folder
from llmprune.results.run_folder.products import JOURNAL, LOCK, PRODUCTS, ROUNDS
from llmprune.results.run_folder.replacing import (
    NEXT,
    complete_swap,
    has_model,
    refuse_other_recipe,
    remove,
    take_over,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=Figures)

_FORMAT = 2


class RunFolder:
    """Folder of one run, locked by one run at a time; only the first of its processes reads and writes."""

    def __init__(self, home: Path, lock: IO[str] | None, *, inside: str = "") -> None:
        self.home = home  # folder that the user named
        self.path = home / inside  # folder of the products: home, or NEXT within it if they replace a finished run
        self.steps: list[Step] = []
        self._lock = lock
        self._recipe: dict[str, Any] = {}
        self._origin = ""
        self._journal = self._read_journal()

    @classmethod
    def open(
        cls, path: Path, fresh: bool = False, *, model: str | None = None, recipe: Mapping[str, Any] | None = None
    ) -> RunFolder:
        """Create or continue a run folder.

        ``fresh``: discard an unfinished run; a finished one remains until the new run has a model. ``model``: the model
        that the run reads.
        ``recipe``: values that determine the pruned model; None opens the folder for reading.
        Raises OutputError if the path is a file, holds other files or the finished run of another recipe, is in use, or
        if the result would replace ``model``.
        """
        if not is_first_process():
            return cls(path, None)
        try:
            require_run_folder(path)
            _refuse_own_result(path, model)
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            try:
                complete_swap(path, (*PRODUCTS, JOURNAL))
                return cls._choose(path, lock, fresh=fresh, recipe=recipe)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise OutputError(f"the output folder {path} cannot be used: {error}; choose another --output") from error

    @classmethod
    def open_finished(cls, path: Path) -> RunFolder:
        """Open the folder of a run to work on its result. Raises OutputError if it is not a run's folder, or in use."""
        if is_first_process() and not is_run(path):
            raise OutputError(f"{path} is not the folder of a run; give the folder that llmprune run wrote to")
        return cls.open(path)

    @classmethod
    def _choose(cls, home: Path, lock: IO[str], *, fresh: bool, recipe: Mapping[str, Any] | None) -> RunFolder:
        """Return the folder's run, or the unfinished one that is to replace it."""
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
                "%s: a run of another recipe with --fresh was not finished; delete this folder to free its space",
                begun.path,
            )
        found = cls(home, lock)
        if recipe is not None and has_model(home):
            refuse_other_recipe(home, found._recipe, wanted=recipe, locations=False)
        return found

    def begin(self, recipe: Mapping[str, Any], origin: str) -> None:
        """Record the inputs of the run, before its first product.

        ``origin``: fingerprint of base model, text and code. If the folder's finished model has another origin, the run
        writes to ``NEXT`` until it can replace it. Raises OutputError if that model was made by another recipe.
        """
        if is_first_process():
            if self.path == self.home and has_model(self.home) and self._origin != origin:
                refuse_other_recipe(self.home, self._recipe, wanted=recipe, locations=True)
                self.path = self.home / NEXT
                self._journal = self._read_journal()
            self.path.mkdir(exist_ok=True)
            self._recipe, self._origin = dict(recipe), origin
            self._write_journal()
        self.path = broadcast_from_first(self.path)

    def take_over(self) -> None:
        """Replace the folder's finished run by this run, if there is one."""
        if is_first_process() and self.path != self.home:
            take_over(self.home, (*PRODUCTS, JOURNAL))
        self.path = broadcast_from_first(self.home)

    def close(self) -> None:
        """Unlock the folder; remove the new run of a replacement if it has no product yet."""
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
        """Return the product ``file``, loaded if it exists with this fingerprint, otherwise made by ``make``.

        ``make`` writes the file and returns its value. With several processes, the first decides, loads and makes it;
        with ``together`` all make it; all return its value. A product that cannot be read is made again, unless
        ``load`` raises an LLMPruneError.
        """
        path = self.path / file
        reused, value = broadcast_from_first(
            self._reuse(name, fingerprint, path=path, load=load) if is_first_process() else (False, None)
        )
        if reused and value is not None:
            return value
        if is_first_process() and name in self._journal:  # a killed process must not leave a new file under the old one
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

    def produce_figures(self, name: str, fingerprint: str, *, file: str, kind: type[F], make: Callable[[], F]) -> F:
        """Return the product ``file``, figures as JSON, as ``produce`` does; all processes make them."""

        def written(path: Path) -> F:
            found = make()
            self.write(path.name, found.model_dump_json(indent=1) + "\n")
            return found

        return self.produce(name, fingerprint, file=file, load=kind.read, make=written, together=True)

    def _reuse(self, name: str, fingerprint: str, *, path: Path, load: Callable[[Path], T]) -> tuple[bool, T | None]:
        recorded = self._journal.get(name, {})
        if recorded.get("fingerprint") != fingerprint or not path.exists():
            return False, None
        try:
            value = load(path)
        except LLMPruneError:
            raise
        except Exception as error:  # errors of pydantic, json and safetensors have no common base
            logger.warning("%s is damaged (%s) and will be made again", path, error)
            return False, None
        reused = [Step(**step | {"reused": True}) for step in recorded["steps"]]
        self.steps += reused
        for step in reused:
            report_reused(step.name)
        return True, value

    def forget(self, name: str) -> None:
        """Have the next run make a product again, because its file is about to change."""
        if is_first_process() and self._journal.pop(name, None) is not None:
            self._write_journal()

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each product."""
        return {name: str(recorded["fingerprint"]) for name, recorded in self._journal.items()}

    def write(self, file: str, text: str) -> Path:
        """Write a text file completely or not at all, in the first process only."""
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
                raise OutputError(
                    f"{self.path} holds a run of another version of llmprune ({JOURNAL} has format "
                    f"{str(journal['format'])[:20]}, and this version reads {_FORMAT}); continue it with that version, "
                    "choose another --output, or run with --fresh to start over"
                )
            self._recipe, self._origin = dict(journal["recipe"]), str(journal["origin"])
            products: dict[str, dict[str, Any]] = journal["products"]
            return products
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} cannot be read ({error}); run with --fresh to start over") from error

    def _write_journal(self) -> None:
        journal = {"format": _FORMAT, "recipe": self._recipe, "origin": self._origin, "products": self._journal}
        self.write(JOURNAL, json.dumps(journal, indent=1) + "\n")


def bytes_at_hand(home: Path, *, fresh: bool) -> int:
    """Return the bytes of a folder that its next run reuses or, with ``fresh``, deletes; they need not be free."""
    if not fresh:
        return sum(folder_size(folder / name) for folder in (home, home / NEXT) for name in ("model", "model.partial"))
    return folder_size(home / NEXT) + (0 if has_model(home) else sum(folder_size(home / name) for name in PRODUCTS))


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
    for name in (ROUNDS, *PRODUCTS, JOURNAL):  # the journal last: until then the folder is recognised as a run's
        remove(path / name)
