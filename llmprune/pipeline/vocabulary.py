"""Last step of a run's model: the cut of its vocabulary, whose logits are compared with those of the whole one.

Everything before works on the dense model's token ids, so hidden states, refit and training see no other tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.anatomy.vocabulary import new_ids_of
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.checkpoint.placement import free_on_all_gpus
from llmprune.checkpoint.result.pruned_source import pruned_source
from llmprune.checkpoint.result.verify import Probe, Verified
from llmprune.checkpoint.vocabulary.cut_checkpoint import CutCheckpoint, VocabularyCut
from llmprune.common.distributed import broadcast_from_first, is_first_process
from llmprune.common.files import replace_folder
from llmprune.common.out_of_memory import free_cached_memory
from llmprune.cut.decision import Cut
from llmprune.data.vocabulary.comparison import OTHER_TEXTS
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.prune_checkpoint import PrunedCheckpoint
from llmprune.pipeline.step_costs import measure_step
from llmprune.pipeline.verify_saved import SavedModel, verify_saved
from llmprune.planning.vocabulary.choice import ChosenVocabulary
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.result_files import BaseFiles
from llmprune.results.figures.vocabulary import VocabularyFigures, VocabularySource
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.products import FULL_VOCABULARY, RECOVERY, VOCABULARY, VOCABULARY_STATE

STEP = "vocabulary"


@dataclass(frozen=True)
class CutVocabulary:
    """Facts about the checkpoint with fewer tokens, kept as ``vocabulary.json`` in the run folder.

    ``pruned``: as of the checkpoint before, with sizes, files and verification of this one.
    """

    pruned: PrunedCheckpoint
    figures: VocabularyFigures

    def with_bits(self, bits_per_byte: tuple[float, float] | None) -> VocabularyFigures:
        """Return the figures with the bits per byte of the dense and the final model."""
        return self.figures.model_copy(update={"bits_per_byte": bits_per_byte})

    def to_json(self) -> str:
        """Serialise for the product file."""
        values = {"pruned": json.loads(self.pruned.to_json()), "figures": self.figures.model_dump()}
        return json.dumps(values) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> CutVocabulary:
        """Read the product file."""
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(PrunedCheckpoint.from_dict(values["pruned"]), VocabularyFigures.model_validate(values["figures"]))


def full_vocabulary_source(context: RunContext, cut: Cut) -> ModelSource:
    """Return the model before the cut of its vocabulary: the base itself where nothing else is cut."""
    if context.recipe.cuts_only_vocabulary:
        return context.recipe.model
    return pruned_source(context.recipe.model, context.folder.path / FULL_VOCABULARY, layers=cut.layers)


def cut_vocabulary(context: RunContext, cut: Cut, *, pruned: PrunedCheckpoint | None) -> CutVocabulary | None:
    """Write the run's ``model`` with the cut's tokens and verify it; or reuse the one in the run folder.

    None where the recipe keeps all tokens. ``pruned``: facts about the model before, None where that is the base.
    Raises VerificationError where the kept tokens have other logits, or the new tokenizer encodes otherwise.
    """
    chosen, inputs, folder = context.inputs.texts.vocabulary, context.inputs, context.folder
    if chosen is None or cut.vocabulary is None:
        return None
    origin = fingerprint(
        inputs.identity,
        file_fingerprint(folder.path / "pruning.json", folder.path / RECOVERY) if pruned else None,
        cut.vocabulary.tolist(),
        [source.model_dump_json() for source in context.vocabulary_sources],
        context.recipe.vocabulary,
        context.recipe.export,
    )
    step = _Step(context, cut, chosen, pruned)

    if is_first_process() and not (folder.path / "model" / "config.json").is_file():
        (folder.path / VOCABULARY).unlink(missing_ok=True)
    made = folder.produce(STEP, origin, file=VOCABULARY, load=CutVocabulary.from_json, make=step.make, together=True)
    if is_first_process():
        shutil.rmtree(folder.path / VOCABULARY_STATE, ignore_errors=True)
    folder.take_over()
    return made


@dataclass(frozen=True)
class _Step:
    """The cut of the vocabulary of one run."""

    context: RunContext
    cut: Cut
    chosen: ChosenVocabulary
    pruned: PrunedCheckpoint | None

    def make(self, path: Path) -> CutVocabulary:
        """Write and verify the checkpoint in the first process; every process returns the same value."""
        context, folder = self.context, self.context.folder
        context.inputs.release()
        free_cached_memory()
        free, made = free_on_all_gpus(), None
        if is_first_process():
            with measure_step(folder.steps, STEP):
                made = self._write(free)
            replace_folder(folder.path / VOCABULARY_STATE / "checkpoint", folder.path / "model")
            folder.write(path.name, made.to_json())
        made = broadcast_from_first(made)
        assert made is not None, "the first process makes it or raises"
        return made

    def _write(self, free: dict[int, int]) -> CutVocabulary:
        context, inputs = self.context, self.context.inputs
        source, tokenizer = full_vocabulary_source(context, self.cut), inputs.tokenizer
        assert tokenizer is not None, "the vocabulary was chosen with it"
        is_base = context.recipe.cuts_only_vocabulary
        types = inputs.saved_dtypes if is_base and context.recipe.model.dtype != "auto" else None
        staging = context.folder.path / VOCABULARY_STATE
        shutil.rmtree(staging, ignore_errors=True)
        cutting = VocabularyCut(source, self.keep_K, tokenizer, types)
        written = cutting.write(staging, context.recipe.export.max_shard_size)
        decoder = open_decoder(source)
        probe = self._probe(decoder)
        decoder.release()
        records = self.pruned.records if self.pruned else ()
        saved = SavedModel(written.folder, probe, decoder, written.parameters, records)
        verified = verify_saved(context, self.cut, saved=saved, free=free)
        return CutVocabulary(self._facts(written, verified), self._figures(written, verified))

    @property
    def keep_K(self) -> Tensor:  # noqa: N802 - a tensor's name carries its shape
        """Ids of the tokens kept, ascending."""
        assert self.cut.vocabulary is not None, "the step is not made without"
        return self.cut.vocabulary

    def _probe(self, decoder: Decoder) -> Probe:
        """Return the logits of the kept tokens by the model with the whole vocabulary, under the new ids."""
        tokenizer = self.context.inputs.tokenizer
        assert tokenizer is not None, "the vocabulary was chosen with it"
        texts = [source.sample for source in self.chosen.text.sources]
        ids_L = torch.tensor([index for text in texts for index in tokenizer(text, add_special_tokens=False).input_ids])
        length = self.context.recipe.calibration.read_shape()[1]
        kept_1L = ids_L[torch.isin(ids_L, self.keep_K)][None, :length]
        forward = LayerwiseForward(decoder, kept_1L, batch_size=1)
        for index in range(len(decoder)):
            with decoder.layer(index) as layer:
                forward.pass_through(index, layer)
        probe, new_ids = Probe.take(forward), new_ids_of(self.keep_K)
        ids_BL = torch.tensor([[new_ids[index] for index in row] for row in probe.ids_BL.tolist()])
        return replace(probe, ids_BL=ids_BL, logits_BPV=probe.logits_BPV[..., self.keep_K])

    def _facts(self, written: CutCheckpoint, verified: Verified) -> PrunedCheckpoint:
        size = self.pruned.size if self.pruned else self.context.plan.dense
        sizes = {"parameters": written.parameters, "bytes": written.bytes, "vocabulary": len(self.keep_K)}
        files = BaseFiles(carried=written.carried, left=written.left_out, rewritten=written.rewritten)
        if self.pruned:
            files = files.model_copy(update={"left": self.pruned.base_files.left | files.left})
        return PrunedCheckpoint(
            records=self.pruned.records if self.pruned else (),
            verified=verified,
            size=size.model_copy(update=sizes),
            left_heads=tuple(sorted({*(self.pruned.left_heads if self.pruned else ()), *written.left_heads})),
            base_files=files,
        )

    def _figures(self, written: CutCheckpoint, verified: Verified) -> VocabularyFigures:
        written.tokenizers.compare(OTHER_TEXTS)
        sources = []
        for source in self.chosen.text.sources:
            found = written.tokenizers.compare(source.held_out)
            sources.append(
                VocabularySource(
                    name=source.name,
                    characters=source.characters,
                    held_out_bytes=found.bytes,
                    tokens_before=found.tokens_before,
                    tokens_after=found.tokens_after,
                    lines=found.lines,
                    same_lines=found.same_lines,
                )
            )
        return VocabularyFigures(
            tokens=self.chosen.tokens,
            kept=len(self.keep_K),
            required={reason: len(ids) for reason, ids in self.chosen.required.by_reason.items()},
            coverage=self.chosen.text.coverage(self.keep_K),
            sources=tuple(sources),
            largest_logit_difference=verified.largest_logit_difference,
        )
