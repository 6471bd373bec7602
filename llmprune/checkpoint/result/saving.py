"""Write an ordinary checkpoint layer by layer, so that no incomplete one is ever at its final place.

Every finished layer is written to its own file in a separate folder. These parts are then joined into shards, the
config is written last, and everything is flushed to disk. The caller renames the folder after it is verified.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.checkpoint.copied_files import (
    FileSelection,
    copy_selected,
    select_files,
)
from llmprune.common.files import apply_umask, disk_errors, fsync

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmprune.checkpoint.result.config_file import ConfigChange

    Tensors = dict[str, Tensor]


_GROUP = 128 << 20  # bytes of one part: the memory that writing takes in addition to the layer


class CheckpointWriter:
    """Writer of the parts of a checkpoint in ``folder``/parts, which are joined in ``folder``/checkpoint.

    The parts are kept, and joining them again gives the same files. ``change``: of the base's config; the base's files
    are copied as ``copied_files`` selects them. Without it, transformers writes config and tokenizer.

    Raises ModelError, before anything is written, where a file of the base cannot be read or its config not be edited.
    """

    def __init__(
        self, folder: Path, skeleton: PreTrainedModel, *, layers_path: str, change: ConfigChange | None = None
    ) -> None:
        self.skeleton, self.layers_path, self.change = skeleton, layers_path, change
        self.parts, self.folder = folder / "parts", folder / "checkpoint"
        self.selection, self.left_heads = FileSelection((), {}), dict[str, int]()
        if change is not None:
            from llmprune.checkpoint.prediction_heads import fields_of_left_heads
            from llmprune.checkpoint.result.config_file import edited_config

            self.selection = select_files(change.base, change.trusted)
            if not change.heads:
                self.left_heads = fields_of_left_heads(change, skeleton, layers_path=layers_path)
            edited_config(change, self.left_heads)

    def write_rest(self, tensors: Tensors) -> None:
        """Write all tensors outside the layers. Tied tensors are written once."""
        tied = set(self.skeleton.all_tied_weights_keys)
        self._write("rest", {name: tensor for name, tensor in tensors.items() if name not in tied})

    def write_layer(self, index: int, tensors: Tensors) -> None:
        """Write one finished layer."""
        self._write(f"layer-{index:05}", {f"{self.layers_path}.{index}.{name}": t for name, t in tensors.items()})

    def write_heads(self, tensors: Iterable[Tensors]) -> None:
        """Write the tensors of prediction heads, which have the names of the files already."""
        for number, some in enumerate(tensors):
            self._write_stored(f"heads-{number:05}", some)

    def _write(self, name: str, tensors: Tensors) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        # some families fuse tensors in memory that are separate in their files: views, which are copied group by group
        self._write_stored(name, revert_weight_conversion(self.skeleton, tensors))

    def _write_stored(self, name: str, stored: Tensors) -> None:
        from safetensors.torch import save_file

        with disk_errors(self.parts):
            self.parts.mkdir(parents=True, exist_ok=True)
            for number, group in enumerate(_groups(stored)):
                path = self.parts / f"{name}-{number:05}.safetensors"
                save_file({key: tensor.contiguous() for key, tensor in group.items()}, path, {"format": "pt"})
                fsync(path)

    def finish(self, max_shard_size: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Join the parts into shards of at most ``max_shard_size`` bytes, and add tokenizer and configs.

        ``tokenizer``: written only without a base, whose own files are copied.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True)
            shards = list(self._join(max_shard_size))
            self._name_shards(shards)
            if self.change is None:
                self._write_anew(tokenizer)
            else:
                self._copy_base_files(self.change)
            for path in self.folder.rglob("*"):
                apply_umask(path)
                fsync(path)
            fsync(self.folder)

    def _copy_base_files(self, change: ConfigChange) -> None:
        """Copy the base's files, and write its config with the cut in it."""
        from llmprune.checkpoint.result.config_file import write_config

        copy_selected(change.base, self.selection, target=self.folder, trusted=change.trusted)
        write_config(
            change,
            self.folder,
            architecture=type(self.skeleton).__name__,
            dtype=self.skeleton.dtype,
            clear=self.left_heads,
        )

    def _write_anew(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder)
        if self.skeleton.generation_config is not None and self.skeleton.can_generate():
            self.skeleton.generation_config.save_pretrained(self.folder)
        config = self.skeleton.config
        config.architectures = [type(self.skeleton).__name__]
        config.save_pretrained(self.folder)

    def _join(self, max_shard_size: int) -> Iterator[dict[str, int]]:
        """Write shards as ``shard-i``; yield the bytes of every tensor of each shard."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        pending: Tensors = {}
        number = 0
        for path in [path for kind in ("rest*", "layer-*", "heads-*") for path in sorted(self.parts.glob(kind))]:
            with safe_open(path, framework="pt") as part:  # memory-mapped: joining needs little memory
                for name in part.keys():  # noqa: SIM118  # safe_open is no mapping
                    tensor = part.get_tensor(name)
                    if pending and _bytes(pending) + tensor.nbytes > max_shard_size:
                        number += 1
                        save_file(pending, self.folder / f"shard-{number}", {"format": "pt"})
                        yield {key: value.nbytes for key, value in pending.items()}
                        pending = {}
                    pending[name] = tensor
        save_file(pending, self.folder / f"shard-{number + 1}", {"format": "pt"})
        yield {key: value.nbytes for key, value in pending.items()}

    def _name_shards(self, shards: list[dict[str, int]]) -> None:
        if len(shards) == 1:
            (self.folder / "shard-1").rename(self.folder / "model.safetensors")
            return
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        for number, name in enumerate(names, start=1):
            (self.folder / f"shard-{number}").rename(self.folder / name)
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in shards)},
            "weight_map": {key: name for name, sizes in zip(names, shards, strict=True) for key in sorted(sizes)},
        }
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _groups(tensors: Tensors) -> Iterator[Tensors]:
    """Divide tensors into groups of at most ``_GROUP`` bytes, larger ones each for itself."""
    group: Tensors = {}
    for name, tensor in tensors.items():
        if group and _bytes(group) + tensor.nbytes > _GROUP:
            yield group
            group = {}
        group[name] = tensor
    yield group


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
