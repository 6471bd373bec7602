"""Write the trained weights as an ordinary checkpoint: the repaired one's files, with other weights in them.

Shapes: B batch, L sequence length, P positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.head_tensors import find_head_tensors
from llmprune.checkpoint.loading import load_config
from llmprune.checkpoint.location import folder_of
from llmprune.checkpoint.open_decoder import open_decoder, open_reader
from llmprune.checkpoint.result.config_file import ConfigChange
from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.checkpoint.result.verify import Probe
from llmprune.checkpoint.stored_dtypes import Originals
from llmprune.common.distributed import is_first_process
from llmprune.common.progress import track
from llmprune.layerwise.decoder import Tensors
from llmprune.recipe.model import ModelSource
from llmprune.recover.student import Student

_PROBED = 16  # positions


class RecoveredWriter:
    """Writer of trained weights into ``folder``, in the layout and the types of the checkpoint ``repaired``."""

    def __init__(self, repaired: ModelSource, work_folder: Path, *, max_shard_size: int) -> None:
        base, config = folder_of(repaired, "weights"), load_config(repaired)
        self._reader = open_reader(repaired)
        skeleton = open_decoder(repaired, self._reader).skeleton
        self._layers_path = find_layers(skeleton)[0]
        layers = tuple(range(len(find_layers(skeleton)[1])))
        self._heads = None if config.is_custom_code() else find_head_tensors(self._reader.names)
        change = ConfigChange(base, config, config, layers, repaired.trust_remote_code, heads=self._heads is not None)
        self._writer = CheckpointWriter(work_folder, skeleton, layers_path=self._layers_path, change=change)
        self._originals = Originals(self._reader.read, self._reader.names.dtypes)
        self._max_shard_size = max_shard_size
        self.folder = self._writer.folder

    def write(self, student: Student) -> None:
        """Write all tensors; every process calls it, and the first writes."""
        for index in track(range(len(student.layers)), "recovery: saving"):
            tensors = student.layer_tensors(index)
            if is_first_process():
                self._writer.write_layer(index, self._stored(tensors, f"{self._layers_path}.{index}."))
        rest = student.rest_tensors()
        if is_first_process():
            self._writer.write_rest(self._stored(rest, ""))
            if self._heads is not None:
                self._writer.write_heads([{name: self._reader.stored(name) for name in self._heads.names}])
            self._writer.finish(self._max_shard_size, None)

    def _stored(self, tensors: Tensors, prefix: str) -> Tensors:
        """Return tensors in the types of the files; those that the training left alone with the files' values."""
        return self._originals.restore(tensors, prefix, cut=lambda read: read)


@torch.no_grad()
def probe_of(student: Student, ids_BL: Tensor) -> Probe:
    """Return the logits of the trained model in memory at some positions, computed without bfloat16 products."""
    positions_P = torch.linspace(0, ids_BL.shape[1] - 1, min(_PROBED, ids_BL.shape[1])).long()
    logits_BPV = student.logits(ids_BL, quick=False)[:, positions_P.to(student.arithmetic.device)]
    return Probe(ids_BL, positions_P, logits_BPV.float().cpu())
