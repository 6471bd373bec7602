"""lm-eval tasks on a model that is already in memory, sample by sample.

lm-eval is imported inside the functions: a plan that names no task never pays for it.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict

from llmprune.errors import EvaluationError, NumericalError, RecipeError, did_you_mean
from llmprune.evaluation.section import Evaluation
from llmprune.evaluation.speed import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HUB_SETTINGS = "HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_DATASETS_CACHE"


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Value):
    """One document's outcome; the hashes tell whether two runs asked the same question."""

    doc_id: int
    doc_hash: str
    prompt_hash: str
    value: float | None  # None where the metric is no number for a single document


class TaskResult(_Value):
    """One task's primary metric: the first of its metric list, under its first filter."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    value: float  # over all samples, aggregated as the task says
    samples: tuple[Sample, ...]


class TaskResults(_Value):
    """What one model reached in every task; groups and tags stand as their tasks."""

    tasks: tuple[TaskResult, ...]

    def to_json(self) -> str:
        """The whole value as text for a product file."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of ``to_json``; raises pydantic's ValidationError on anything else."""
        return cls.model_validate_json(text)


def check_tasks(evaluation: Evaluation) -> None:
    """Raise RecipeError unless the include folder exists and every task, group or tag is known.

    Reads YAML only: no task code runs and no data is fetched.
    """
    folder = _include_folder(evaluation)
    if not evaluation.tasks:
        return
    with _quiet():
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


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation: Evaluation) -> TaskResults:
    """Evaluate the model where it lies; equal settings ask two models exactly the same questions.

    Sets the global random seeds, and shows lm-eval's progress on a terminal only.
    Raises EvaluationError where a task or its data cannot be loaded, NumericalError
    where its metric is not finite.
    """
    with nullcontext() if sys.stderr.isatty() else _quiet():
        # lm_eval.evaluate, not simple_evaluate: the latter also collects a description of the
        # machine, which took 2.6 s a call, and asks the hub for the model's commit.
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        _seed_everything(evaluation.seed)
        tasks = _load_tasks(evaluation)
        # HFLM gives the tokenizer a padding token, which must not reach the saved checkpoint.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=evaluation.batch_size)
        lm._device = input_device(model)  # HFLM would send the inputs of an offloaded model to "meta"
        results = evaluate(
            lm=lm, task_dict={"tasks": tasks}, limit=evaluation.limit, bootstrap_iters=0, log_samples=True
        )
    return TaskResults(tasks=tuple(_primary(name, results) for name in results["samples"]))


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


def _manager(*folders: Path) -> Any:
    """lm-eval's index of these folders alone, which takes milliseconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False)


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


def fetch_tasks(evaluation: Evaluation) -> None:
    """Load every task and its data once, so that what is out of reach is known before the pruning.

    Raises EvaluationError.
    """
    if evaluation.tasks:
        with nullcontext() if sys.stderr.isatty() else _quiet():
            _load_tasks(evaluation)


def _load_tasks(evaluation: Evaluation) -> dict[str, Any]:
    """lm-eval's task objects by name, with their data, ready for ``lm_eval.evaluate``."""
    folder = _include_folder(evaluation)
    manager = _manager(folder) if folder else None
    if manager is None or not set(evaluation.tasks) <= set(manager.all_subtasks):
        manager = _all_tasks(folder)  # a group or tag may reach into lm-eval's own folders
    tasks: dict[str, Any] = {}
    for name in evaluation.tasks:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # datasets, the hub client and task code raise dozens of kinds
            raise EvaluationError(_unreachable(name, manager, error)) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise EvaluationError(f"the task {name!r} runs code that the model wrote; remove it from evaluation.tasks")
        _set_fewshot(name, task, evaluation)
    return tasks


def _unreachable(name: str, manager: Any, error: Exception) -> str:
    entry = manager.task_index.get(name)
    data = (entry.cfg or {}).get("dataset_path") if entry else None
    return (
        f"the task {name!r} or its data{f' ({data})' if data else ''} cannot be loaded: "
        f"{type(error).__name__}: {str(error).strip()}; for data on the hub check {HUB_SETTINGS}, "
        "or give a folder of tasks with data at hand as evaluation.include_path"
    )


def _set_fewshot(name: str, task: Any, evaluation: Evaluation) -> None:
    """The recipe's examples before each question, except where the task forbids them."""
    own, wanted = task.get_config("num_fewshot"), evaluation.num_fewshot
    if own == 0 and wanted:
        logger.warning("the task %s is defined without examples: num_fewshot %d does not apply to it", name, wanted)
    elif wanted is not None:
        task.set_config(key="num_fewshot", value=wanted)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=evaluation.seed)


def _seed_everything(seed: int) -> None:
    """Before the tasks load: some shuffle their choices as they read their data."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _primary(name: str, results: dict[str, Any]) -> TaskResult:
    rows = results["samples"][name]
    reached, directions = results["results"][name], results["higher_is_better"][name]
    filter_name = rows[0]["filter"]
    candidates = [*directions, *rows[0]["metrics"]]  # the directions stand in the order of the metric list
    metric = next((metric for metric in candidates if f"{metric},{filter_name}" in reached), None)
    if metric is None:
        raise EvaluationError(f"the task {name!r} gave no metric under its filter {filter_name!r}")
    value = float(reached[f"{metric},{filter_name}"])
    if not math.isfinite(value):
        raise NumericalError(f"the task {name!r} gave {metric} = {value}; the model's logits are not finite")
    return TaskResult(
        task=name,
        metric=metric,
        filter=filter_name,
        higher_is_better=directions.get(metric) is not False,
        value=value,
        samples=_samples(rows, metric, filter_name),
    )


def _samples(rows: Sequence[dict[str, Any]], metric: str, filter_name: str) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            doc_id=row["doc_id"],
            doc_hash=row["doc_hash"],
            prompt_hash=row["prompt_hash"],
            value=_number(row.get(metric)),
        )
        for row in rows
        if row["filter"] == filter_name
    )


def _number(value: Any) -> float | None:
    """A plain, finite number; numpy's scalars have ``item``, f1's pairs are no number."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
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
