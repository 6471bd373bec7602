"""Calibration windows that the dense model writes itself, sampled at temperature 1.

They show what the model learned, of which a data set is only a part (LLM-QAT, arXiv 2305.17888). Each begins with the
begin-of-text ids, as the windows that are read. Where these have none, half of them begin with the first tokens of one
of them, and half with a token drawn from the vocabulary. An end-of-text token does not end a window: the next document
follows, as in packed text.

Shapes: N windows, B batch, P prompt tokens, L sequence length.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.anatomy.meta_model import text_config
from llmprune.checkpoint.loading import load_model
from llmprune.common.devices import input_device
from llmprune.common.out_of_memory import BatchSize
from llmprune.common.progress import report_progress
from llmprune.evaluation.decoding import Sampling, generate
from llmprune.evaluation.whole_model import WholeModel
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.step_costs import measure_step
from llmprune.planning.duration.generating import GENERATED_AT_A_TIME, SELF_GENERATED
from llmprune.results.run_folder import fingerprint

_OPENING = 4  # tokens of a read window that a generated one begins with
_KEY = "windows"


def add_self_generated(context: RunContext) -> None:
    """Generate the windows of ``calibration.self_generated``, or load them from the run folder, and add them."""
    inputs, folder = context.inputs, context.folder
    calibration = context.recipe.calibration
    if not calibration.generated:
        return

    def make(path: Path) -> Tensor:
        report_progress(SELF_GENERATED)
        with measure_step(folder.steps, SELF_GENERATED):
            windows_NL = _generated(inputs, warnings=context.batches.calibration.reductions)
        save_file({_KEY: windows_NL}, path)
        return windows_NL

    def load(path: Path) -> Tensor:
        return load_file(path)[_KEY]

    origin = fingerprint(inputs.identity, inputs.text_fingerprint, calibration.generated, calibration.seed)
    windows_NL = folder.produce(SELF_GENERATED, origin, file="self-generated.safetensors", load=load, make=make)
    inputs.inputs.add_generated(windows_NL)


def _generated(inputs: RunInputs, *, warnings: list[str]) -> Tensor:
    """Sample windows int64 [N, L] from the whole dense model; halve the batch where a device's memory is full."""
    openings, count = _openings(inputs), inputs.recipe.calibration.generated
    seed, length = inputs.recipe.calibration.seed, inputs.inputs.text_windows.shape[1]
    whole = WholeModel(lambda: load_model(inputs.recipe.model))

    def work(batch_size: int) -> Tensor:
        model = whole.get()
        device = input_device(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            batches = [ids_BP for ids_NP in openings for ids_BP in torch.split(ids_NP, batch_size)]
            parts = [generate(model, ids_BP, settings=Sampling(length - ids_BP.shape[1])) for ids_BP in batches]
        return torch.cat(parts).cpu()

    batch_size = BatchSize(min(GENERATED_AT_A_TIME, count), alone=True, reductions=warnings)
    windows_NL = batch_size.run(SELF_GENERATED, work)
    whole.release()
    return windows_NL


def _openings(inputs: RunInputs) -> list[Tensor]:
    """Return the tokens that the generated windows begin with, in groups of one length, each int64 [N, P]."""
    calibration, text = inputs.recipe.calibration, inputs.inputs.calibration_text
    count = calibration.generated
    if text.begin:
        return [torch.tensor([text.begin]).repeat(count, 1)]
    drawn = count // 2
    read_NP = text.windows_NL[torch.arange(count - drawn) % len(text.windows_NL), :_OPENING]
    return [read_NP, _drawn(inputs, drawn)] if drawn else [read_NP]


def _drawn(inputs: RunInputs, count: int) -> Tensor:
    """Draw single tokens of the vocabulary that are not special, int64 [N, 1]."""
    tokenizer, seed = inputs.tokenizer, inputs.recipe.calibration.seed
    size = text_config(inputs.config).vocab_size
    ids = torch.arange(size if tokenizer is None else min(len(tokenizer), size))
    if tokenizer is not None:
        ids = ids[~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=ids.dtype))]
    return ids[torch.randint(len(ids), (count, 1), generator=torch.Generator().manual_seed(seed))]
