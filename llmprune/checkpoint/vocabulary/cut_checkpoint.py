"""Write a checkpoint again with fewer tokens: embedding, head, config and tokenizer.

Shapes: V tokens of the checkpoint, K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import build_meta_model, find_layers, text_config
from llmprune.anatomy.selection import select_along
from llmprune.anatomy.vocabulary import find_vocabulary, new_ids_of, vocabulary_config
from llmprune.checkpoint.file_names import Dtypes
from llmprune.checkpoint.loading import load_tokenizer
from llmprune.checkpoint.location import folder_of
from llmprune.checkpoint.open_decoder import open_reader
from llmprune.checkpoint.result.config_file import ConfigChange
from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.checkpoint.vocabulary.tokenizer_files import rewrite_tokenizer_files
from llmprune.common.progress import track
from llmprune.data.vocabulary.comparison import TokenizerPair
from llmprune.data.vocabulary.segmentation import read_state
from llmprune.recipe.model import ModelSource


@dataclass(frozen=True)
class CutCheckpoint:
    """A checkpoint in ``folder`` with fewer tokens, and its tokenizer beside that of the whole vocabulary.

    ``carried``, ``rewritten``, ``left_out``: files other than weights and config; ``left_heads``: as the writer has it.
    """

    folder: Path
    parameters: int
    bytes: int
    tokenizers: TokenizerPair
    carried: tuple[str, ...]
    rewritten: tuple[str, ...]
    left_out: dict[str, str]
    left_heads: tuple[str, ...]


@dataclass(frozen=True)
class VocabularyCut:
    """The cut of the tokens of a checkpoint: ``keep_K`` are the ids kept, ascending, int64 [K].

    ``dtypes``: types of the saved tensors, by name; None for those of the files.
    """

    source: ModelSource
    keep_K: Tensor
    tokenizer: PreTrainedTokenizerBase
    dtypes: Dtypes | None = None

    def write(self, folder: Path, max_shard_size: int) -> CutCheckpoint:
        """Write the checkpoint into ``folder``/checkpoint.

        Raises ModelError where config or tokenizer cannot be cut, VerificationError where a special token got lost.
        """
        reader = open_reader(self.source)
        model, trusted = reader.names.model, self.source.trust_remote_code
        before, place = model.config, folder_of(self.source, "weights")
        after, new_ids = vocabulary_config(before, self.keep_K), new_ids_of(self.keep_K)
        skeleton = build_meta_model(after, model.dtype, trust_remote_code=trusted)
        skeleton._weight_conversions = reader.names.used_rules or None
        path, layers = find_layers(model)
        change = ConfigChange(place, before, after, tuple(range(len(layers))), trusted)
        writer = CheckpointWriter(folder, skeleton, layers_path=path, change=change)
        names = list(filter(reader.names.has, model.state_dict()))
        dims = find_vocabulary(model, trust_remote_code=trusted).dims
        keep = {name: (dim, self.keep_K) for name, dim in dims.items()}
        rest = [name for name in names if not name.startswith(f"{path}.")]
        writer.write_rest(select_along(reader.read(rest, dtypes=self.dtypes), keep))
        for index in track(range(len(layers)), "vocabulary: copying layers"):
            prefix = f"{path}.{index}."
            tensors = reader.read([name for name in names if name.startswith(prefix)], dtypes=self.dtypes)
            writer.write_layer(index, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
        writer.finish(max_shard_size, self.tokenizer)
        state, tokens = read_state(self.tokenizer), text_config(before).vocab_size
        files = rewrite_tokenizer_files(writer.folder, state, new_ids=new_ids, tokens=tokens)
        new = load_tokenizer(self.source.model_copy(update={"id": str(writer.folder.absolute())}))
        pair = TokenizerPair(self.tokenizer, new, new_ids)
        pair.require_special_tokens()
        selection = writer.selection
        untouched = set(selection.copied) - {*files.rewritten, *files.left_out}
        return CutCheckpoint(
            folder=writer.folder,
            parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
            bytes=sum(path.stat().st_size for path in writer.folder.glob("*.safetensors")),
            tokenizers=pair,
            carried=tuple(name for name in selection.copied if name in untouched),
            rewritten=files.rewritten,
            left_out=selection.left_out | files.left_out,
            left_heads=tuple(writer.left_heads),
        )
