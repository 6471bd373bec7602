"""Inputs of a run: the dense model and token windows, each loaded when a step first needs it.

A run that reuses all its products loads no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import Config, text_config
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.file_names import Dtypes
from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.location import hub_commit, identity
from llmprune.checkpoint.open_decoder import open_decoder, open_reader
from llmprune.checkpoint.stored_dtypes import Originals, kept_dtypes
from llmprune.checkpoint.weights_reader import WeightsReader
from llmprune.common.distributed import broadcast_from_first, is_first_process, rank, world_size
from llmprune.data.sources import commit_of
from llmprune.data.window_sources import generated_windows
from llmprune.data.windows import TextWindows, fingerprint_tokens
from llmprune.evaluation.prompts import Prompts
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.pipeline.reference_model import ReferenceModel
from llmprune.planning.memory.device_memory import DeviceMemory
from llmprune.planning.texts.calibration_sources import calibration_sources
from llmprune.planning.texts.text_inputs import TextInputs
from llmprune.prune.snapshots import boot
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.calibration import CalibrationSource
from llmprune.results.run_folder.fingerprints import code_fingerprint, fingerprint
from llmprune.results.run_folder.products import HIDDEN_STATES


class RunInputs:
    """The dense model and the token windows of one recipe.

    ``reserve``: bytes of disk that the result needs; ``devices``: planned memory of the devices.
    """

    def __init__(
        self,
        recipe: Recipe,
        anatomy: Anatomy,
        *,
        texts: TextInputs,
        reserve: int = 0,
        devices: Sequence[DeviceMemory] = (),
    ) -> None:
        self.recipe = recipe
        self.anatomy = anatomy
        self.texts = texts
        self.reserve = reserve
        self.devices = devices
        self.reference_model = ReferenceModel(recipe, working=self.whole_devices)
        self._evicted = False  # True after a device ran out of memory

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the model; None where it has none and the recipe needs none."""
        return self.texts.tokenizer

    @property
    def windows(self) -> Tensor:
        """Calibration tokens int64 [N, L]."""
        return self.texts.windows

    @property
    def calibration_text(self) -> TextWindows:
        """Calibration windows with their begin-of-text id."""
        return replace(self.texts.calibration_text, windows_NL=self.windows)

    @property
    def sources(self) -> Tensor | None:
        """Index of the source of each calibration window, int64 [N]; None for ready tokens."""
        return self.texts.sources

    @property
    def generated(self) -> Tensor | None:
        """True for calibration windows that the dense model writes itself, bool [N]; None where it writes none."""
        return generated_windows(self.recipe.calibration)

    @property
    def held_out(self) -> Tensor | None:
        """Held-out tokens for perplexity, int64 [N, L]; None where the recipe measures none."""
        return self.texts.held_out

    @property
    def held_out_text(self) -> TextWindows | None:
        """Held-out windows with their begin-of-text id; None where the recipe measures none."""
        return self.texts.held_out_text

    @property
    def prompts(self) -> Prompts | str | None:
        """Prompts of the generation check; a sentence why it is left out; None where the recipe turns it off."""
        return self.texts.prompts

    @property
    def config(self) -> Config:
        """Config of the dense model."""
        return self.texts.config

    def read_texts(self) -> tuple[Tensor, Tensor | None]:
        """Read texts and prompts, so that missing text ends the run before the expensive work; return the texts."""
        self.texts.prompts  # noqa: B018  # read for its errors
        if self.recipe.recover is not None and self.recipe.recover.tokens is not None:
            self.texts.recovery_text(self.texts.recovery_number())
        return self.texts.text_windows, self.held_out

    @property
    def calibration_sources(self) -> tuple[CalibrationSource, ...]:
        """Sources of the calibration windows, with windows, documents and commits."""
        documents = self.texts.documents or ()
        return calibration_sources(self.recipe.calibration, documents=documents, commits=self.dataset_commits)

    @cached_property
    def dataset_commits(self) -> dict[str, str]:
        """Commit of each hub data set that calibration, perplexity, recovery and vocabulary are read from."""
        recovery = self.texts.recovery_settings if self.recipe.recover else None
        windows = (self.recipe.calibration, self.recipe.evaluation.perplexity, recovery)
        sources = [source for part in windows if part is not None for source in part.text_sources()]
        sources += (self.recipe.vocabulary and self.recipe.vocabulary.keep_for) or ()
        commits = {source.dataset: commit_of(source) for source in sources}
        return {name: commit for name, commit in commits.items() if commit}

    @cached_property
    def windows_fingerprint(self) -> str:
        """Fingerprint of the calibration windows."""
        return self.calibration_text.fingerprint()

    @cached_property
    def text_fingerprint(self) -> str:
        """Fingerprint of the calibration tokens that are read, without those that the dense model writes itself."""
        return self.texts.calibration_text.fingerprint()

    @cached_property
    def model(self) -> PreTrainedModel:
        """Whole dense model, placed by the device map: for what cannot be done layer by layer."""
        return load_model(self.recipe.model)

    @cached_property
    def reader(self) -> WeightsReader:
        """Reader of the base's weights files."""
        return open_reader(self.recipe.model)

    @cached_property
    def dense(self) -> Decoder:
        """Decoder of the dense model, whose layers are read from the files."""
        planned = {gpu.index: gpu.free - gpu.outside - gpu.resident for gpu in self.devices if gpu.index is not None}
        working = self.whole_devices if self._evicted else planned
        decoder = open_decoder(self.recipe.model, self.reader, working=working)
        if self.recipe.calibration.has_images:
            decoder.images = self.texts.calibration_text.images
        if self._evicted:
            decoder.save_memory()
        return decoder

    @property
    def reference(self) -> Decoder:
        """Decoder of the model that the pruned one is trained towards and compared with: mostly the dense one."""
        return self.dense if self.recipe.reference == self.recipe.model else self._other_reference

    @cached_property
    def _other_reference(self) -> Decoder:
        return self.reference_model.open()

    @property
    def whole_devices(self) -> dict[int, int]:
        """Memory of each GPU by its number: to be left free by a decoder of which no layer is to stay."""
        return {gpu.index: gpu.total for gpu in self.devices if gpu.index is not None}

    def release(self) -> None:
        """Drop the dense model and its decoder; they are opened again where a later step needs them."""
        if "dense" in self.__dict__:
            self.dense.release()  # decoders of a cut read from it
        for name in ("model", "dense", "reader", "_other_reference"):
            self.__dict__.pop(name, None)

    def evict(self) -> None:
        """Have no layer on its device but the one that is visited, after a device ran out of memory."""
        self._evicted = True
        if "dense" in self.__dict__:  # it is not opened for that
            self.dense.save_memory()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the computation."""
        dtype: torch.dtype = self.reader.names.model.dtype
        return dtype

    @property
    def originals(self) -> Originals | None:
        """Tensors of the base in the types of its files; None where the recipe converts all to another type."""
        if self.recipe.model.dtype != "auto":
            return None
        return Originals(self.reader.read, self.reader.names.dtypes)

    @cached_property
    def saved_dtypes(self) -> Dtypes:
        """Types of the result's tensors, by their names in the dense model."""
        return kept_dtypes(self.reader.names, self.dtype, keep=self.recipe.model.dtype == "auto")

    @property
    def commit(self) -> str | None:
        """Hub commit that the model was loaded from; None for a folder."""
        return hub_commit(self.recipe.model)

    @cached_property
    def identity(self) -> str:
        """Fingerprint of what every product depends on: the base model, the arithmetic, libraries and code."""
        sources = (self.recipe.model, *([self.recipe.reference] if self.recipe.recover else []))
        bases = {identity(source): None for source in sources}
        libraries = torch.__version__, transformers.__version__
        return fingerprint(*bases, self.recipe.model.dtype, *libraries, code_fingerprint())

    def hidden_state_store(
        self, folder: Path, batch_size: int, *, windows_NL: Tensor | None = None
    ) -> HiddenStateStore:
        """Return the store for hidden states of the calibration windows, or of ``windows_NL``, in batches.

        It has a cache on disk below ``folder`` where the disk is large enough; every process of the run decides alike.
        """
        windows_NL = self.windows if windows_NL is None else windows_NL
        calibration, length = self.recipe.calibration, windows_NL.shape[1]
        hidden = text_config(self.config).hidden_size * self.dtype.itemsize
        size = self.anatomy.num_layers * len(windows_NL) * length * hidden
        parts = (self.identity, self.text_fingerprint, fingerprint_tokens(windows_NL), batch_size, world_size())
        key = fingerprint(*parts, boot())[:16]
        place = folder / HIDDEN_STATES
        cached = broadcast_from_first(self._fits_on_disk(place, key, size=size) if is_first_process() else False)
        cache = HiddenStateCache(place, f"{key}-{rank()}") if cached else None
        return HiddenStateStore(calibration.stream_memory, folder, cache, self.hidden_state_bytes)

    def store_without_cache(self, folder: Path) -> HiddenStateStore:
        """Return the store for hidden states of other windows, which no later step reads from the disk."""
        return HiddenStateStore(self.recipe.calibration.stream_memory, folder, None, self.hidden_state_bytes)

    @property
    def hidden_state_bytes(self) -> int:
        """Bytes of hidden states that stay on the devices together; none after a device ran out of memory."""
        planned = [gpu.hidden_states for gpu in self.devices if gpu.index is not None]
        return 0 if self._evicted else min(planned, default=0)

    def _fits_on_disk(self, place: Path, key: str, *, size: int) -> bool:
        """Check whether the disk has space for a cache of ``size`` bytes, the hidden states after every layer.

        The first check leaves a marker file. Later ones find part of the cache, and other files of the run, on the
        disk already, and only require space for the rest.
        """
        marker = place / f"{key}.planned"
        free, allowed = shutil.disk_usage(place.parent).free, self.recipe.calibration.stream_disk
        if marker.is_file():
            return size <= allowed and size - sum(path.stat().st_size for path in place.glob(f"{key}-*")) <= free
        if size > min(allowed, free // 2, free - self.reserve):
            return False
        place.mkdir(exist_ok=True)
        marker.touch()
        return True
