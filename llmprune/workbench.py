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

from llmprune.anatomy.blueprint import Config, text_config
from llmprune.anatomy.value import Anatomy
from llmprune.calibration import fingerprint_tokens
from llmprune.inputs import Inputs
from llmprune.model.loading import dense_decoder, hub_commit, identity, load_model
from llmprune.model.processes import count, from_first, rank
from llmprune.model.streams import StreamStore, Trail
from llmprune.model.walk import Decoder
from llmprune.recipe import Recipe
from llmprune.run_folder import TRAIL, code_fingerprint, fingerprint
from llmprune.snapshots import boot
from llmprune.texts import commit_of

logger = logging.getLogger(__name__)


class Workbench:
    """The dense model and the calibration windows of one recipe."""

    def __init__(self, recipe: Recipe, anatomy: Anatomy, inputs: Inputs) -> None:
        self.recipe = recipe
        self.anatomy = anatomy
        self.inputs = inputs

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

    def store(self, folder: Path, windows_NL: Tensor | None = None) -> StreamStore:
        """Where the hidden states of the calibration tokens, or of these, may live."""
        windows_NL = self.windows if windows_NL is None else windows_NL
        calibration, length = self.recipe.calibration, windows_NL.shape[1]
        hidden = text_config(self.config).hidden_size * self.model.dtype.itemsize
        size = self.anatomy.num_layers * len(windows_NL) * length * hidden
        room = min(calibration.stream_disk, shutil.disk_usage(folder).free // 2)
        key = fingerprint(self.identity, fingerprint_tokens(windows_NL), calibration.batch_size, count(), boot())
        trail = Trail(folder / TRAIL, f"{key[:16]}-{rank()}") if from_first(size <= room) else None
        return StreamStore(calibration.stream_memory, folder, trail)

    @property
    def device(self) -> str:
        """The hardware that computes, in words."""
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
