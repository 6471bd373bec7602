"""lm-eval's tasks: which there are, loaded with their data, and what their results depend on.

lm-eval is imported inside the functions: a plan that names no task never pays for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmprune.common.errors import EvaluationError, RecipeError, did_you_mean
from llmprune.common.hub.time_limits import limit_waits
from llmprune.evaluation.lm_eval.task_names import require_names
from llmprune.recipe.evaluation import Backend, Evaluation

logger = logging.getLogger(__name__)

HUB_SETTINGS = "HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_DATASETS_CACHE"
_LARGE = 10_000_000  # bytes of a file in the include folder that is told by its time, not by its contents


@dataclass(frozen=True)
class Loaded:
    """One of lm-eval's tasks with its data."""

    name: str
    task: Any
    group: str | None  # that the recipe named and that this task came with


def check_tasks(evaluation: Evaluation) -> None:
    """Raise RecipeError unless the include folder exists and every task, group, tag and the backend are known.

    Reads YAML only: no task code runs and no data is fetched.
    """
    folder = _include_folder(evaluation)
    if evaluation.backend:
        _check_backend(evaluation.backend)
    if not evaluation.tasks:
        return
    with quiet():
        missing = set(evaluation.tasks)
        if folder is not None:
            missing -= set(_manager(folder).all_tasks)
        if missing:
            missing -= _named_in_defaults(missing)
        if not missing:
            return
        known = _all_tasks(folder).all_tasks
    unknown = [name for name in evaluation.tasks if name in missing and name not in known]
    if unknown:
        where = f"neither lm-eval nor {folder} has a" if folder else "lm-eval has no"
        remedy = "correct the name" if folder else "correct it, or give its folder as evaluation.include_path"
        raise RecipeError(
            [
                f"evaluation.tasks: {where} task, group or tag {name!r}{did_you_mean(name, known)}; {remedy}"
                for name in unknown
            ]
        )


def fetch_tasks(evaluation: Evaluation) -> None:
    """Load every task and its data once, so that what is out of reach is known before the pruning.

    Raises EvaluationError, and RecipeError where the gate or the metrics name what the tasks do not have.
    """
    if evaluation.tasks:
        with quiet_unless_watched():
            load_tasks(evaluation)


def load_tasks(evaluation: Evaluation) -> tuple[Loaded, ...]:
    """The tasks with their data and examples, groups and tags as their tasks. Sets the global random seeds.

    Raises as ``fetch_tasks`` does.
    """
    limit_waits()
    seed_everything(evaluation.seed)
    folder = _include_folder(evaluation)
    manager = _manager(folder) if folder else None
    if manager is None or not all(_lies_within(manager, name) for name in evaluation.tasks):
        manager = _all_tasks(folder)  # a tag or a group may reach into lm-eval's own folders
    loaded: dict[str, Loaded] = {}
    for wanted in evaluation.tasks:
        try:
            found = manager.load([wanted])
        except Exception as error:  # datasets, the hub client and task code raise dozens of kinds
            raise EvaluationError(_unreachable(wanted, manager, error=error)) from error
        group = wanted if wanted in found["groups"] else None
        for name, task in found["tasks"].items():
            loaded.setdefault(name, Loaded(name, task, group))
    for one in loaded.values():
        if getattr(one.task, "UNSAFE_CODE", False):
            raise EvaluationError(
                f"the task {one.name!r} runs code that the model wrote; remove it from evaluation.tasks"
            )
        _set_fewshot(one.name, one.task, evaluation=evaluation)
    require_names(evaluation, loaded)
    return tuple(loaded.values())


def task_fingerprint(one: Loaded, evaluation: Evaluation) -> str:
    """What a task's results depend on beside the model: its files, its data, the settings and the harness."""
    splits = getattr(one.task, "dataset", None) or {}
    data = {str(split): getattr(rows, "_fingerprint", repr(rows)) for split, rows in dict(splits).items()}
    settings = evaluation.model_dump(mode="json", include={"limit", "num_fewshot", "batch_size", "seed"})
    parts = [
        one.name,
        one.group,
        one.task.dump_config(),
        _contents(_include_folder(evaluation)),
        data,
        settings,
        evaluation.metrics.get(one.name),
        evaluation.backend.model_dump(mode="json") if evaluation.backend else None,
        [version(library) for library in ("lm-eval", "transformers", "torch", "datasets")],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def seed_everything(seed: int | None) -> None:
    """Before tasks load, and before each runs: some shuffle their choices as they read their data.

    None seeds as the ``lm_eval`` command does by default, so that both ask the same.
    """
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    torch.manual_seed(DEFAULT_OTHER_SEED if seed is None else seed)


def quiet_unless_watched() -> AbstractContextManager[None]:
    """lm-eval's progress on a terminal, silence elsewhere."""
    return nullcontext() if sys.stderr.isatty() else quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's log lines and progress bars.

    tqdm reads its environment on import only, so its constructor is replaced meanwhile.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

    chatter, original = logging.getLogger("lm_eval"), tqdm.__init__
    level = chatter.level

    def without_bar(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options | {"disable": True})

    chatter.setLevel(logging.ERROR)
    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = original
        chatter.setLevel(level)


def _check_backend(backend: Backend) -> None:
    from lm_eval.models import MODEL_MAPPING

    if backend.name not in MODEL_MAPPING:
        near = did_you_mean(backend.name, list(MODEL_MAPPING)) or f"; it has {', '.join(MODEL_MAPPING)}"
        raise RecipeError(f"evaluation.backend.name: lm-eval has no backend {backend.name!r}{near}")


def _include_folder(evaluation: Evaluation) -> Path | None:
    if evaluation.include_path is None:
        return None
    folder = Path(evaluation.include_path).expanduser()
    if not folder.is_dir():
        raise RecipeError(
            f"evaluation.include_path: {folder} is not a folder (looked in {Path.cwd()}); "
            "give the folder that holds the task's .yaml file"
        )
    return folder


def _contents(folder: Path | None) -> list[tuple[str, str]]:
    """Name and state of every file in the include folder: a task may read any of them."""
    if folder is None:
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [(str(path.relative_to(folder)), _state(path)) for path in files]


def _state(path: Path) -> str:
    found = path.stat()
    if found.st_size > _LARGE:
        return f"{found.st_size} {found.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _manager(*folders: Path) -> Any:
    """lm-eval's index of these folders alone, which takes milliseconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False)


def _lies_within(manager: Any, name: Any) -> bool:
    """Whether a task, or a group with all its parts, is known to this index; of a tag that cannot be said."""
    if not isinstance(name, str):  # a part that a group defines on the spot, perhaps upon another's task
        return False
    if name in manager.all_groups:
        parts = (manager.task_index[name].cfg or {}).get("task")
        return isinstance(parts, list) and all(_lies_within(manager, part) for part in parts)
    return name in manager.all_subtasks


@lru_cache(maxsize=1)
def _all_tasks(folder: Path | None) -> Any:
    """lm-eval's index of its own 14,000 task files and the folder's: 13 s on two slow cores."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _named_in_defaults(names: set[str]) -> set[str]:
    """Those names that lm-eval's own folders define; a name defined by inclusion can be missed.

    Looks for the names in the text first and parses only the folders that have them.
    """
    import lm_eval.tasks

    either = "|".join(re.escape(name) for name in names)
    defined = re.compile(rf"^\s*(?:-|(?:task|group|tag)\s*:)\s*['\"]?(?:{either})['\"]?\s*$".encode(), re.MULTILINE)
    files = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
    folders = {file.parent for file in files if defined.search(file.read_bytes())}
    return names & set(_manager(*sorted(folders)).all_tasks)


def _unreachable(name: str, manager: Any, *, error: Exception) -> str:
    entry = manager.task_index.get(name)
    data = (entry.cfg or {}).get("dataset_path") if entry else None
    return (
        f"the task {name!r} or its data{f' ({data})' if data else ''} cannot be loaded: "
        f"{type(error).__name__}: {str(error).strip()}; for data on the hub check {HUB_SETTINGS}, "
        "or give a folder of tasks with data at hand as evaluation.include_path"
    )


def _set_fewshot(name: str, task: Any, *, evaluation: Evaluation) -> None:
    """The recipe's examples before each question, except where the task forbids them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own, wanted = task.get_config("num_fewshot"), evaluation.num_fewshot
    if own == 0 and wanted:
        logger.warning("the task %s is defined without examples: num_fewshot %d does not apply to it", name, wanted)
    elif wanted is not None:
        task.set_config(key="num_fewshot", value=wanted)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED if evaluation.seed is None else evaluation.seed)
