"""The speed table of a model: read from a file, kept from an earlier measurement, or measured now.

Tables are kept in HF_HOME, each under the fingerprint of what its times depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from pydantic import ValidationError

from llmprune.common.devices import device_name
from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.errors import DiskError, RecipeError
from llmprune.common.files import write_text
from llmprune.evaluation.bench.speed_measurement import Timer, measure_speed_table
from llmprune.evaluation.bench.speed_prediction import can_tell, dense_shape, predict, require_telling
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.recipe.evaluation import Speed
from llmprune.results.figures.speed_table import SpeedTable

logger = logging.getLogger(__name__)

_PLACE = "budget.speed_table"


def speed_table(
    subject: SpeedSubject,
    *,
    settings: Speed,
    asked: float,
    file: str | None = None,
    time: Timer | None = None,
) -> SpeedTable:
    """Return the model's speed table; without a file and without one that is kept, it is measured and kept.

    Of several processes the first reads or measures, and all return the same. ``asked``: the speed to be told from 1,
    times the dense model's; a kept table that cannot tell it is measured again. Raises RecipeError for a wrong file,
    EvaluationError where the measurements spread too much, ModelError where the memory is too small.
    """
    table = None
    if is_first_process():
        table = stored_table(subject, settings=settings, file=file)
        if file is None and (table is None or not can_tell(table, asked)):
            table = measure_and_keep(subject, settings=settings, time=time)
    table = broadcast_from_first(table)
    assert table is not None, "the first process has a table or raises"
    require_telling(table, asked)
    return table


def stored_table(subject: SpeedSubject, *, settings: Speed, file: str | None = None) -> SpeedTable | None:
    """Return the table of a file, or else the kept one; None where there is none. Raises RecipeError for the file."""
    if file is not None:
        return read_table(Path(file).expanduser(), subject, settings=settings)
    path = kept_file(subject, settings)
    try:
        return SpeedTable.read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used (%s): the speed is measured again", path, error)
        return None


def measure_and_keep(subject: SpeedSubject, *, settings: Speed, time: Timer | None = None) -> SpeedTable:
    """Measure the table and keep it, in place of an earlier one."""
    table = measure_speed_table(subject, settings=settings, time=time)
    path = kept_file(subject, settings)
    with suppress(DiskError, OSError):  # a cache that cannot be written is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, table)
    return table


def write_table(path: Path, table: SpeedTable) -> None:
    """Write a table as JSON. Raises DiskError."""
    write_text(path, table.model_dump_json(indent=1) + "\n")


def read_table(path: Path, subject: SpeedSubject, *, settings: Speed) -> SpeedTable:
    """Read a table from a file.

    Raises RecipeError where it is none or damaged, another model's, or of other numbers of tokens.
    """
    remedy = "write one with `llmprune speed MODEL --output FILE` on the machine that it is for"
    try:
        table = SpeedTable.read(path)
    except OSError as error:
        raise RecipeError(f"{_PLACE}: {path} cannot be read ({error.strerror}); {remedy}") from error
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(map(str, found["loc"]))
        raise RecipeError(
            f"{_PLACE}: {path} is not a speed table ({place or 'JSON'}: {found['msg']}); {remedy}"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{_PLACE}: {path} is not a text file ({error}); {remedy}") from error
    _require_same_model(table, path, subject=subject)
    _require_same_case(table, path, settings=settings)
    dense = predict(table, dense_shape(table.sizes))
    if min(dense.prefill, dense.decode) <= 0:
        raise RecipeError(
            f"{_PLACE}: the times in {path} add up to {dense.prefill:g} s of prefill and {dense.decode:g} s a token "
            f"for the dense model, and both must be above zero; {remedy}"
        )
    return table


def _require_same_model(table: SpeedTable, path: Path, *, subject: SpeedSubject) -> None:
    """Raise RecipeError with the sizes that differ."""
    theirs, ours = table.sizes.model_dump(), subject.sizes.model_dump()
    different = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if different:
        raise RecipeError(
            f"{_PLACE}: {path} is the table of another model, {table.model}: {'; '.join(different)}; write one with "
            f"`llmprune speed {subject.source.id} --output FILE`"
        )


def _require_same_case(table: SpeedTable, path: Path, *, settings: Speed) -> None:
    """Raise RecipeError with the settings that differ."""
    names = [
        name
        for name in ("batch_size", "prompt_tokens", "new_tokens")
        if getattr(table, name) != getattr(settings, name)
    ]
    if names:
        measured = ", ".join(f"{name} {getattr(table, name)}" for name in names)
        asked = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
        options = " ".join(f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in names)
        raise RecipeError(
            f"{_PLACE}: {path} was measured with {measured}, and budget asks for {asked}; change the budget, or write "
            f"another table with `llmprune speed {table.model} {options} --output FILE`"
        )


def kept_file(subject: SpeedSubject, settings: Speed) -> Path:
    """Return the file in HF_HOME that keeps the table of this model, machine and numbers of tokens."""
    from huggingface_hub.constants import HF_HOME

    depends_on = {
        "sizes": subject.sizes.model_dump(),
        "dtype": subject.dtype_name,
        "device": f"{platform.node()}, {device_name(subject.device)}",
        "versions": [torch.__version__, transformers.__version__],
        "case": [settings.batch_size, settings.prompt_tokens, settings.new_tokens],
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Path(HF_HOME) / "llmprune" / "speed" / f"{subject.sizes.model_type}-{digest[:20]}.json"
