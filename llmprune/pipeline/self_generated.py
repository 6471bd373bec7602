"""Calibration windows that the dense model writes itself, sampled at temperature 1.

They show what the model learned, of which a data set is only a part (LLM-QAT, arXiv 2305.17888). Each begins with the
begin-of-text ids, as the windows that are read. Where these have none, half of them begin with a token drawn from
them, and half with one drawn from the vocabulary. An end-of-text token does not end a window: the next document
follows, as in packed text.

Shapes: N windows, B batch, P prompt tokens, L sequence length.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import text_config
from llmprune.checkpoint.loading import load_model
from llmprune.common.devices import input_device
from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.out_of_memory import BatchSize
from llmprune.common.progress import report_progress
from llmprune.evaluation.decoding import Sampling, generate
from llmprune.evaluation.whole_model import WholeModel
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.step_costs import measure_step
from llmprune.planning.duration.generating import GENERATED_AT_A_TIME, SELF_GENERATED
from llmprune.planning.duration.generating import RECOVERY_GENERATED as RECOVERY_STEP
from llmprune.planning.texts.self_generated import ChosenNumbers
from llmprune.publish.generated_windows import KEY, read_generated
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import GENERATED_WINDOWS, JOURNAL, PLAN, ROUNDS
from llmprune.results.run_folder.replacing import NEXT, recipe_of_model

logger = logging.getLogger(__name__)


def generated_in_folder(recipe: Recipe, output: Path) -> ChosenNumbers:
    """Return the numbers of windows that the run folder's run chose for ``self_generated: auto``.

    The memory that is free now must not change the windows of a run that is continued or repeated. A number is None
    where the recipe gives one, ``output`` has no run with the same sections, or the model was to write windows and has
    not.
    """
    recover = recipe.recover
    asked = recipe.calibration.self_generated, recover.data.self_generated if recover else False
    if "auto" not in asked:
        return ChosenNumbers()
    found = broadcast_from_first(_numbers_in(output, recipe) if is_first_process() else ChosenNumbers())
    return ChosenNumbers(*(n if one == "auto" else None for one, n in zip(asked, astuple(found), strict=True)))


def _numbers_in(output: Path, recipe: Recipe) -> ChosenNumbers:
    wanted, calibration = recipe_of_model(recipe), recipe.calibration
    for folder in (output / NEXT, output):
        try:
            journal, plan = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (JOURNAL, PLAN))
            if _sections(journal["recipe"], "model.", "calibration.") != _sections(wanted, "model.", "calibration."):
                continue
            products = journal["products"] | _products_of_round(output)
            number = int(plan["calibration"][0]) - calibration.read_shape()[0]
            if number not in ([0, calibration.generated] if SELF_GENERATED in products else [0]):
                continue
            own = int(plan["recovery"]["generated"]) if plan.get("recovery") else 0
            same = _sections(journal["recipe"], "recover.") == _sections(wanted, "recover.")
            return ChosenNumbers(number, own if same and (not own or RECOVERY_STEP in products) else None)
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged, which opening the folder reports
            continue
    return ChosenNumbers()


def _products_of_round(output: Path) -> dict[str, Any]:
    """Return the products of the first round, which writes the windows where there are several rounds."""
    journal = output / ROUNDS / "1" / JOURNAL
    return dict(json.loads(journal.read_text(encoding="utf-8"))["products"]) if journal.is_file() else {}


def _sections(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.startswith(names)}


def add_self_generated(context: RunContext, published: Path | None = None) -> None:
    """Generate the windows of ``calibration.self_generated``, or load them from the run folder, and add them.

    ``published``: file of the windows of a published run, which are taken if their number and length are the recipe's.
    """
    inputs, folder = context.inputs, context.folder
    calibration = context.recipe.calibration
    if not calibration.generated:
        return

    def make(path: Path) -> Tensor:
        report_progress(SELF_GENERATED)
        shape = calibration.generated, inputs.texts.text_windows.shape[1]
        windows_NL = published_if_fitting(inputs, published, shape=shape) if published else None
        if windows_NL is None:
            with measure_step(folder.steps, SELF_GENERATED):
                windows_NL = _generated(inputs, warnings=context.batches.calibration.reductions)
        save_file({KEY: windows_NL}, path)
        return windows_NL

    def load(path: Path) -> Tensor:
        return load_file(path)[KEY]

    given = [file_fingerprint(published)] if published else []
    origin = fingerprint(inputs.identity, inputs.text_fingerprint, calibration.generated, calibration.seed, *given)
    windows_NL = folder.produce(SELF_GENERATED, origin, file=GENERATED_WINDOWS, load=load, make=make)
    inputs.texts.add_generated(windows_NL)


def published_if_fitting(inputs: RunInputs, path: Path, *, shape: tuple[int, int]) -> Tensor | None:
    """Return the windows of a published run; None, with a warning, where the recipe wants another number or length."""
    if path.suffix == ".safetensors":  # of another round
        windows_NL = load_file(path)[KEY]
    else:
        windows_NL = read_generated(path, vocabulary=text_config(inputs.config).vocab_size)
    if tuple(windows_NL.shape) == shape:
        return windows_NL
    logger.warning(
        "the dense model writes %d windows of %d tokens anew, because the published ones are %d of %d",
        *shape,
        *windows_NL.shape,
    )
    return None


def _generated(inputs: RunInputs, *, warnings: list[str]) -> Tensor:
    """Sample windows int64 [N, L] from the whole dense model; halve the batch where a device's memory is full."""
    calibration = inputs.recipe.calibration
    prompts_NP = openings(inputs, calibration.generated, seed=calibration.seed)
    settings = Sampling(inputs.texts.text_windows.shape[1] - prompts_NP.shape[1])
    whole = WholeModel(lambda: load_model(inputs.recipe.model))

    def work(batch_size: int) -> Tensor:
        model = whole.get()
        with seeded(model, calibration.seed):
            parts = [generate(model, ids_BP, settings=settings) for ids_BP in torch.split(prompts_NP, batch_size)]
        return torch.cat(parts).cpu()

    batch_size = BatchSize(min(GENERATED_AT_A_TIME, len(prompts_NP)), alone=True, reductions=warnings)
    windows_NL = batch_size.run(SELF_GENERATED, work)
    whole.release()
    return windows_NL


@contextmanager
def seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Draw random numbers from ``seed`` on the model's device, and leave those of the process as they were."""
    device = input_device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def openings(inputs: RunInputs, count: int, *, seed: int) -> Tensor:
    """Return the tokens that ``count`` generated windows begin with, int64 [N, P]."""
    text = inputs.texts.calibration_text
    if text.begin:
        return torch.tensor([text.begin]).repeat(count, 1)
    random = torch.Generator().manual_seed(seed)
    of_text = _draw(text.windows_NL.flatten(), count - count // 2, random=random)
    return torch.cat([of_text, _draw(_words(inputs), count // 2, random=random)])[:, None]


def _draw(ids: Tensor, count: int, *, random: torch.Generator) -> Tensor:
    """Draw some of the ids [T], each as likely as the others."""
    return ids[torch.randint(len(ids), (count,), generator=random)]


def _words(inputs: RunInputs) -> Tensor:
    """Return the tokens of the vocabulary that are not special, int64 [V]."""
    tokenizer, size = inputs.tokenizer, text_config(inputs.config).vocab_size
    if tokenizer is None:
        return torch.arange(size)
    ids = torch.arange(min(len(tokenizer), size))
    return ids[~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=ids.dtype))]
