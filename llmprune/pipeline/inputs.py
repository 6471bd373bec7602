"""What the steps of a run work on, each loaded when a step first needs it.

A run that finds all its products done loads no weights at all.
"""

from __future__ import annotations

import logging
import shutil
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import Config, build_meta_model, text_config
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.loading import dense_decoder, headers_of, hub_commit, identity, load_model, place_of
from llmprune.checkpoint.stored_dtypes import Dtypes, FileNames, Originals
from llmprune.common.distributed import count, from_first, is_first, rank
from llmprune.data.sources import commit_of
from llmprune.data.windows import fingerprint_tokens
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.hidden_states import HiddenStateCache, HiddenStateStore
from llmprune.planning.inputs import Inputs
from llmprune.prune.snapshots import boot
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder import TRAIL, code_fingerprint, fingerprint

logger = logging.getLogger(__name__)


class RunInputs:
    """The dense model and the calibration windows of one recipe. ``reserve``: bytes of disk that the result needs."""

    def __init__(self, recipe: Recipe, anatomy: Anatomy, *, inputs: Inputs, reserve: int = 0) -> None:
        self.recipe = recipe
        self.anatomy = anatomy
        self.inputs = inputs
        self.reserve = reserve

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None where it has none and the recipe needs none."""
        return self.inputs.tokenizer

    @property
    def windows(self) -> Tensor:
        """Calibration tokens int64 [N, L]."""
        return self.inputs.windows

    @property
    def crossings(self) -> int | None:
        """How many calibration windows hold parts of several documents; None of ready tokens."""
        return self.inputs.crossings

    @property
    def sources(self) -> Tensor | None:
        """Which source each calibration window is from, int64 [N]; None for ready tokens."""
        return self.inputs.sources

    @property
    def held_out(self) -> Tensor | None:
        """Tokens for perplexity int64 [N, L]; None where the recipe asks for none."""
        return self.inputs.held_out

    @property
    def config(self) -> Config:
        """The dense model's config."""
        return self.inputs.config

    def read_texts(self) -> tuple[Tensor, Tensor | None]:
        """Read all text that the run needs, before the expensive work finds it missing."""
        return self.windows, self.held_out

    @property
    def dataset_commits(self) -> dict[str, str]:
        """The commit of each hub data set that calibration and perplexity are read from."""
        windows = (self.recipe.calibration, self.recipe.evaluation.perplexity)
        sources = [source for part in windows if part is not None for source in part.text_sources()]
        commits = {source.dataset: commit_of(source) for source in sources}
        return {name: commit for name, commit in commits.items() if commit}

    @cached_property
    def windows_fingerprint(self) -> str:
        """What the calibration tokens are."""
        return fingerprint_tokens(self.windows)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model, placed by the device map."""
        return load_model(self.recipe.model)

    @cached_property
    def dense(self) -> Decoder:
        """The dense model as the walk sees it."""
        return dense_decoder(self.model)

    @cached_property
    def _file_names(self) -> FileNames:
        """Which tensors of the base's files make each of the model's."""
        blueprint = build_meta_model(
            self.config, self.model.dtype, trust_remote_code=self.recipe.model.trust_remote_code
        )
        return FileNames(blueprint, headers_of(self.recipe.model) or {})

    @cached_property
    def originals(self) -> Originals | None:
        """The base's tensors in the types of its files; None where the recipe converts all to another type."""
        if self.recipe.model.dtype != "auto":
            return None
        return Originals(self._file_names, place_of(self.recipe.model, "weights"))

    @cached_property
    def saved_dtypes(self) -> Dtypes:
        """The types of the result's tensors, by the names of the dense model."""
        if self.recipe.model.dtype != "auto":
            return {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        return self._file_names.dtypes

    @property
    def commit(self) -> str | None:
        """The hub commit that the model was loaded from; None for a folder."""
        return hub_commit(self.recipe.model)

    @cached_property
    def identity(self) -> str:
        """What every product depends on: the base model as it is, the arithmetic, and the code."""
        base = identity(self.recipe.model)
        libraries = torch.__version__, transformers.__version__
        return fingerprint(base, self.recipe.model.dtype, *libraries, code_fingerprint())

    def store(self, folder: Path, windows_NL: Tensor | None = None) -> HiddenStateStore:
        """Where the hidden states of the calibration tokens, or of these, may live."""
        windows_NL = self.windows if windows_NL is None else windows_NL
        calibration, length = self.recipe.calibration, windows_NL.shape[1]
        hidden = text_config(self.config).hidden_size * self.model.dtype.itemsize
        size = self.anatomy.num_layers * len(windows_NL) * length * hidden
        key = fingerprint(self.identity, fingerprint_tokens(windows_NL), calibration.batch_size, count(), boot())[:16]
        place = folder / TRAIL
        kept = from_first(self._keeps_trail(place, key, size=size) if is_first() else False)
        trail = HiddenStateCache(place, f"{key}-{rank()}") if kept else None
        return HiddenStateStore(calibration.stream_memory, folder, trail)

    def _keeps_trail(self, place: Path, key: str, *, size: int) -> bool:
        """Whether the hidden states after every layer, ``size`` bytes in all, are kept on disk.

        Decided once and noted with them: later their own bytes are missing from the free disk, and those of what else
        the run has written. Then only the rest must fit.
        """
        noted = place / f"{key}.planned"
        free, allowed = shutil.disk_usage(place.parent).free, self.recipe.calibration.stream_disk
        if noted.is_file():
            return size <= allowed and size - sum(path.stat().st_size for path in place.glob(f"{key}-*")) <= free
        if size > min(allowed, free // 2, free - self.reserve):
            return False
        place.mkdir(exist_ok=True)
        noted.touch()
        return True

    @property
    def device(self) -> str:
        """The hardware that computes, in words."""
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
