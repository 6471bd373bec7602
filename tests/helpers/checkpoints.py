"""Pass 2 on a model in memory, saved as a checkpoint: what tests of cuts and repairs have in common."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.checkpoint.skeleton import tensors_of
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.recipe.refit import Refit

BATCH_SIZE = 4


def prune_and_save(
    model: PreTrainedModel,
    anatomy: Anatomy,
    *,
    dense: Decoder,
    cut: Cut,
    ids_NL: Tensor,
    folder: Path,
    refit: Refit | None = Refit(),  # noqa: B008  # frozen
    store: HiddenStateStore | None = None,
    max_shard_size: int = 20_000,
) -> tuple[list[LayerRecord], LayerwiseForward]:
    """Run pass 2 into ``folder/checkpoint``; return the layers' records, and the pruned model after its last layer."""
    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    writer = CheckpointWriter(folder, pruned.skeleton, layers_path=pruned.layers_path)
    writer.write_rest(tensors_of(pruned.skeleton, skip=pruned.layers_path))
    pruning = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=refit, write=writer.write_layer)
    records, forward = pruning.run(ids_NL, BATCH_SIZE, store=store)
    writer.finish(max_shard_size=max_shard_size, tokenizer=None)
    return records, forward
