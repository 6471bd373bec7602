"""Merge an adapter into its base by peft, layer by layer, as an ordinary checkpoint in a cache.

Source: ``merge_and_unload`` of peft, whose layers are merged here one after the other with the same functions.
"""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from llmprune.anatomy.meta_model import Config, build_meta_model, find_layers, quiet_transformers, text_config
from llmprune.checkpoint.config_limits import check_config_file
from llmprune.checkpoint.converted.adapted_model import AdaptedModel, whole_tensors
from llmprune.checkpoint.converted.adapter import ADAPTER_WEIGHTS, Adapter, is_of_tokenizer
from llmprune.checkpoint.converted.conversion import Conversion, digest_of
from llmprune.checkpoint.copied_files import CONFIG, copy_selected, select_files
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.file_references import ADAPTER, TEMPLATES, unread_fields
from llmprune.checkpoint.quantized.formats import quantization_of
from llmprune.checkpoint.quantized.quantizers import drop_quantization
from llmprune.checkpoint.result.config_file import ConfigChange, write_config
from llmprune.checkpoint.result.saving import CheckpointWriter
from llmprune.checkpoint.stored_dtypes import require_all
from llmprune.checkpoint.weight_headers import headers_of_folder, read_config
from llmprune.checkpoint.weights_reader import WeightsReader
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.recipe.model import ModelSource

_VERSION = 1  # of the merge; increased when its files change
_SHARD = 5_000_000_000  # bytes of a weights file
_CARD = "README.md"


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter is merged into.

    ``source``: as it is named; ``identity``: of its files; ``folder``: returns the folder of its small files, or with
    the weights (``whole``).
    """

    source: ModelSource
    identity: str
    folder: Callable[[bool], Path]


def adapter_conversion(adapter: Adapter, base: AdapterBase) -> Conversion:
    """Return the conversion of an adapter and its base to one checkpoint."""
    files = [adapter.folder / ADAPTER, adapter.folder / ADAPTER_WEIGHTS, *adapter.small_files]
    names = ",".join(path.name for path in files)
    digest = digest_of(names, *files, base.identity, str(base.source.trust_remote_code))
    return Conversion(
        name=f"{Path(adapter.shown.rstrip('/')).name or 'adapter'}-{digest}-a{_VERSION}",
        shown=f"{adapter.shown} and its base {base.source.id}",
        note=f"the adapter is merged into {base.source.id} once, layer by layer, before the cut: the sizes assume that "
        "all tensors are {dtype}",
        describe=lambda folder: _describe(adapter, base, folder=folder),
        convert=lambda folder: _convert(adapter, base, folder=folder),
        base=base.source.id,
    )


def _describe(adapter: Adapter, base: AdapterBase, *, folder: Path) -> None:
    """Write the config and the tokenizer of the merged model, and check that the adapter fits."""
    merge = _Merge(adapter, base, folder=base.folder(False))
    model, trusted = merge.plain, base.source.trust_remote_code
    copy_selected(merge.change.base, select_files(merge.change.base, trusted), target=folder, trusted=trusted)
    write_config(merge.change, folder, architecture=type(model).__name__, dtype=model.dtype)
    merge.add_small_files(folder)


def _convert(adapter: Adapter, base: AdapterBase, *, folder: Path) -> None:
    """Write the merged model, layer by layer."""
    merge = _Merge(adapter, base, folder=base.folder(True))
    with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
        finished = merge.write(Path(parts))
        shutil.rmtree(folder)
        finished.rename(folder)
    merge.add_small_files(folder)


class _Merge:
    """The merge of an adapter into the base in ``folder``.

    ``change``: of the base's config; ``plain``: the merged model without weights. Raises ModelError where the two do
    not fit.
    """

    def __init__(self, adapter: Adapter, base: AdapterBase, *, folder: Path) -> None:
        self.adapter, self.base = adapter, base
        before = _config_of(folder, base, adapter=adapter)
        after, self.plain = before, self._build(before)
        rows = _rows_of_embeddings(self.plain, adapter)
        self._is_resized = rows not in (None, text_config(before).vocab_size)
        if self._is_resized:
            after = copy.deepcopy(before)
            text_config(after).vocab_size = rows
            self.plain = self._build(after)
        self._ties = dict(self.plain.all_tied_weights_keys)
        self.adapted = AdaptedModel(self._build(after), adapter, base_shown=base.source.id)
        if self._splits_ties():
            after = _untied(after)
            self.plain = self._build(after)
            if self.plain.all_tied_weights_keys:
                raise ModelError(
                    f"{adapter.shown} changes the embeddings and the output matrix of {base.source.id} in different "
                    "ways, and its config cannot say that these are two matrices; train the adapter without them"
                )
        layers = tuple(range(len(find_layers(self.plain)[1])))
        self.change = ConfigChange(folder, before, after, layers, base.source.trust_remote_code)

    def _build(self, config: Config) -> PreTrainedModel:
        dtype = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None) or torch.float32
        return build_meta_model(config, dtype, trust_remote_code=self.base.source.trust_remote_code)

    def _splits_ties(self) -> bool:
        """Check whether tied matrices, such as embeddings and output matrix, differ with the adapter in them.

        They start from the same weights, so that zeros in their place show it. Embeddings of another size that are in
        the adapter once are still shared.
        """
        touched, whole, shapes = self.adapted.touched, self.adapted.whole, self._shapes()
        for pair in self._ties.items():
            in_whole = [name in whole for name in pair]
            if not any(name in touched for name in pair) or (self._is_resized and any(in_whole) and not all(in_whole)):
                continue
            zeros = {name: torch.zeros(shapes[name]) for name in pair}
            first, second = self.adapted.merged(zeros, check=False).values()
            if not torch.equal(first.nan_to_num(), second.nan_to_num()):
                return True
        return False

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.plain.state_dict().items()}

    def write(self, folder: Path) -> Path:
        """Write the merged weights, with the base's files, below a folder; return the folder of the checkpoint."""
        shown = self.base.source.id
        headers = headers_of_folder(self.change.base, shown)
        if not headers:
            raise CheckpointError(
                f"{shown}, the base of {self.adapter.shown}, has no safetensors weights file; save it again with "
                "save_pretrained"
            )
        quantization = quantization_of(read_config(self.change.base))
        names = FileNames(self._build(self.change.before), headers, quantization=quantization)
        require_all(names, shown)
        reader = WeightsReader(names, self.change.base, shown=shown)
        self.plain._weight_conversions = names.used_rules or None
        path, layers = find_layers(self.plain)
        writer = CheckpointWriter(folder, self.plain, layers_path=path, change=self.change)
        state = list(self.plain.state_dict())
        writer.write_rest(self._merged(reader, [name for name in state if not name.startswith(f"{path}.")]))
        for index in range(len(layers)):
            prefix = f"{path}.{index}."
            merged = self._merged(reader, [name for name in state if name.startswith(prefix)])
            writer.write_layer(index, {name.removeprefix(prefix): tensor for name, tensor in merged.items()})
        writer.finish(_SHARD, None)
        return writer.folder

    def _merged(self, reader: WeightsReader, names: list[str]) -> dict[str, Tensor]:
        """Return weights of the merged model by name, in the types of the base's files."""
        sources = {name: self._ties.get(name, name) for name in names}
        read = reader.read({source for source in sources.values() if reader.names.has(source)})
        base = {name: read[source] for name, source in sources.items() if source in read}
        merged, shapes = self.adapted.merged(base), self._shapes()
        kept = {name: tensor for name, tensor in merged.items() if name not in self.plain.all_tied_weights_keys}
        wrong = next((name for name, tensor in kept.items() if tensor.shape != shapes[name]), None)
        if wrong is not None:
            raise ModelError(
                f"the adapter {self.adapter.shown} does not fit {self.base.source.id}: {wrong} is "
                f"{list(kept[wrong].shape)}, not {list(shapes[wrong])}; name the model that it was trained on in "
                "model.base"
            )
        return merged

    def add_small_files(self, folder: Path) -> None:
        """Put the adapter's tokenizer, where it has one, in the place of the base's, and add the card of the two."""
        own = self.adapter.small_files
        if any(not path.name.endswith(("_config.json", "_map.json", ".jinja")) for path in own):  # a whole tokenizer
            for path in [path for path in folder.iterdir() if is_of_tokenizer(path.name)]:
                path.unlink()
            shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
        for path in own:
            shutil.copyfile(path, folder / path.name)
        places = (self.adapter.folder, self.change.base)
        card = next((place / _CARD for place in places if _has_licence(place / _CARD)), None)
        if card is not None:
            shutil.copyfile(card, folder / _CARD)
        if own:
            self._require_rows(folder)

    def _require_rows(self, folder: Path) -> None:
        """Raise ModelError where the adapter's tokenizer has tokens that the embeddings have no row for."""
        rows = text_config(self.change.after).vocab_size
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **unread_fields(folder))
            last = max(tokenizer.get_vocab().values(), default=0)
        except Exception:  # where the tokenizer is needed, loading it says what is wrong
            return
        if last >= rows:
            raise ModelError(
                f"the tokenizer of the adapter {self.adapter.shown} has ids up to {last:,}, and the embeddings of "
                f"{self.base.source.id} have {rows:,} rows: those of the added tokens are not in the adapter; save it "
                "with its embeddings (save_embedding_layers=True), or remove its tokenizer files"
            )


def _config_of(folder: Path, base: AdapterBase, *, adapter: Adapter) -> Config:
    """Load the base's config. Raises ModelError where it cannot be loaded without code that is not trusted."""
    shown = f"{base.source.id}, the base of {adapter.shown},"
    check_config_file(folder / CONFIG, shown)
    try:
        with quiet_transformers():
            config: Config = AutoConfig.from_pretrained(folder, trust_remote_code=base.source.trust_remote_code)
    except Exception as error:  # config classes raise anything
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{shown} brings its own Python code; if you trust it, set model.trust_remote_code: true, and name it "
                "in model.base, because an adapter's files may not choose what code runs"
            ) from error
        cause = " ".join(str(error).split())[:300]
        raise ModelError(f"the config of {shown} cannot be loaded: {cause}; fetch its files again") from error
    return drop_quantization(config)


def _rows_of_embeddings(model: PreTrainedModel, adapter: Adapter) -> int | None:
    """Return the rows of the input embeddings in an adapter's file; None where it has none."""
    embeddings = model.get_input_embeddings()
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is embeddings)
    shape = whole_tensors(adapter, [name]).get(name)
    return shape[0] if shape else None


def _untied(config: Config) -> Config:
    """Return a copy of a config in which the output matrix is not the embeddings."""
    separate = copy.deepcopy(config)
    for part in {id(part): part for part in (separate, text_config(separate))}.values():
        part.tie_word_embeddings = False
    return separate


def _has_licence(card: Path) -> bool:
    try:
        return re.match(r"---\s*\n(.*\n)*?license\s*:", card.read_text(encoding="utf-8")[:5000]) is not None
    except (OSError, ValueError):
        return False
