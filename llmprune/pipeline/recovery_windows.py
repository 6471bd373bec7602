"""Windows for the training after the cut: of text, and of the dense model itself.

The dense model's own windows are generated in batches that are kept, each from a seed of its own, so that a run that is
killed loses one batch, and a continued run has the windows of an uninterrupted one.

Shapes: N windows, B windows of a batch, L sequence length.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import text_config
from llmprune.common.out_of_memory import BatchSize
from llmprune.common.progress import report_progress
from llmprune.data.recovery_windows import RecoveryWindows, arrange
from llmprune.evaluation.chat_windows import ChatTurns, chat_turns, write_chats
from llmprune.evaluation.decoding import Sampling, generate
from llmprune.evaluation.whole_model import WholeModel
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.self_generated import openings, published_if_fitting, seeded
from llmprune.pipeline.step_costs import measure_step
from llmprune.planning.duration.generating import KEPT_TOGETHER, RECOVERY_GENERATED
from llmprune.publish.generated_windows import KEY
from llmprune.recipe.recover import SelfGenerated
from llmprune.results.run_folder import products
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import RECOVERY_WINDOWS_PARTS

logger = logging.getLogger(__name__)


def windows_of_tokens(context: RunContext, published: Path | None = None) -> RecoveryWindows | None:
    """Return the windows of the recipe's ``recover``; None where it has none, or gives hours."""
    recover = context.recipe.recover
    return recovery_windows(context, published=published) if recover and recover.tokens is not None else None


def recovery_windows(context: RunContext, *, most: int | None = None, published: Path | None = None) -> RecoveryWindows:
    """Return the windows of the recipe's ``recover``, those of the dense model generated now or loaded.

    ``most``: number of windows to train on at most, where the recipe gives ``hours``. ``published``: file of the
    windows that a published run's dense model wrote, taken if the recipe asks for as many of their length. Every
    process calls this. Raises CalibrationError where no text is left.
    """
    settings, inputs = context.recipe.recover, context.inputs.texts
    assert settings is not None, "the recipe has the section"
    number = inputs.recovery_number(most)
    text = inputs.recovery_text(number)
    generated_NL = _generated(context, published) if settings.data.self_generated else None
    windows = arrange(text, generated_NL, number=number, settings=settings, seed=inputs.recovery_settings.seed)
    return windows.part(inputs.part)


@dataclass(frozen=True)
class Writing:
    """Windows that a model is to write, [number, length], from ``seed``. ``turns``: None for no conversations."""

    number: int
    length: int
    temperature: float
    seed: int
    turns: ChatTurns | None

    def batches(self) -> list[range]:
        """Return the windows of each batch that is kept."""
        return [range(start, min(start + KEPT_TOGETHER, self.number)) for start in range(0, self.number, KEPT_TOGETHER)]


def _generated(context: RunContext, published: Path | None) -> Tensor:
    """Return the windows that the dense model writes for the training, int64 [N, L]."""
    inputs, folder = context.inputs, context.folder
    recover = context.recipe.recover
    assert recover is not None
    assert isinstance(recover.data.self_generated, SelfGenerated), "the plan has chosen a number"
    writing = _writing(inputs, recover.data.self_generated)
    given = [file_fingerprint(published)] if published else []
    origin = fingerprint(inputs.identity, inputs.text_fingerprint, writing, *given)

    def make(path: Path) -> Tensor:
        report_progress(RECOVERY_GENERATED)
        taken_NL = (
            published_if_fitting(inputs, published, shape=(writing.number, writing.length)) if published else None
        )
        if taken_NL is not None:
            save_file({KEY: taken_NL}, path)
            return taken_NL
        parts, reductions = folder.path / RECOVERY_WINDOWS_PARTS, context.batches.calibration.reductions
        with measure_step(folder.steps, RECOVERY_GENERATED, tokens=writing.number * writing.length):
            windows_NL = write_windows(inputs, writing, parts=parts / origin[:16], reductions=reductions)
        save_file({KEY: windows_NL}, path)
        shutil.rmtree(parts)
        return windows_NL

    return folder.produce(
        RECOVERY_GENERATED,
        origin,
        file=products.RECOVERY_WINDOWS,
        load=lambda path: load_file(path)[KEY],
        make=make,
    )


def _writing(inputs: RunInputs, asked: SelfGenerated) -> Writing:
    """Return what the model is to write, from another seed than the calibration's windows."""
    text = inputs.texts.recovery_settings
    assert text.sequence_length is not None, "resolved windows have a length"
    turns, tokenizer = None, inputs.tokenizer
    if asked.chat and tokenizer is not None and tokenizer.chat_template:
        vocabulary = text_config(inputs.config).vocab_size
        turns = chat_turns(tokenizer, begin=inputs.texts.calibration_text.begin, vocabulary=vocabulary)
        if turns is None or not turns.fits(text.sequence_length):
            turns = None
            logger.warning(
                "recover.data.self_generated: the dense model writes no conversations, because its chat template does "
                "not show where a user's turn begins and ends, or is too long for %d tokens",
                text.sequence_length,
            )
    seed = (inputs.recipe.calibration.seed + 1) % 2**32
    return Writing(asked.samples, text.sequence_length, asked.temperature, seed, turns)


def write_windows(inputs: RunInputs, writing: Writing, *, parts: Path, reductions: list[str] | None = None) -> Tensor:
    """Generate the batches that are not in the folder ``parts`` yet; return all, int64 [N, L].

    ``reductions``: a sentence for each time that a device's memory was full.
    """
    parts.mkdir(parents=True, exist_ok=True)
    prompts_NP = openings(inputs, writing.number, seed=writing.seed)
    whole = WholeModel(inputs.reference_model.load)
    batch_size = BatchSize(min(KEPT_TOGETHER, writing.number), alone=True, reductions=reductions)
    done, batches = [], writing.batches()
    for index, batch in enumerate(batches):
        path = parts / f"{index:05d}.safetensors"
        if not path.is_file():
            windows_BL = batch_size.run(RECOVERY_GENERATED, _batch(whole, writing, batch=batch, prompts_NP=prompts_NP))
            save_file({KEY: windows_BL}, unfinished := path.with_suffix(".new"))
            unfinished.replace(path)
        done.append(load_file(path)[KEY])
        report_progress(RECOVERY_GENERATED, index + 1, total=len(batches))
    whole.release()
    return torch.cat(done)


def _batch(whole: WholeModel, writing: Writing, *, batch: range, prompts_NP: Tensor) -> Callable[[int], Tensor]:
    """Return the function that samples a batch; its argument: windows at a time."""
    chats = [index for index in batch if writing.turns is not None and index % 2]
    plain = [index for index in batch if index not in chats]

    def work(batch_size: int) -> Tensor:
        model = whole.get()
        with seeded(model, (writing.seed + batch.start) % 2**32):
            rows = [_plain(model, writing, prompts_BP=ids_BP) for ids_BP in torch.split(prompts_NP[plain], batch_size)]
            if writing.turns is not None:
                counts = [len(chats[start : start + batch_size]) for start in range(0, len(chats), batch_size)]
                rows += [
                    write_chats(
                        model, writing.turns, count=count, length=writing.length, temperature=writing.temperature
                    )
                    for count in counts
                ]
        return torch.cat(rows).cpu()

    return work


def _plain(model: PreTrainedModel, writing: Writing, *, prompts_BP: Tensor) -> Tensor:
    settings = Sampling(writing.length - prompts_BP.shape[1], temperature=writing.temperature)
    return generate(model, prompts_BP, settings=settings)
