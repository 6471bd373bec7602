"""What the steps of a run work on, each loaded when a step first needs it.

A run that finds all its products done loads no weights at all.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.anatomy.blueprint import Config, text_config
from llmprune.anatomy.value import Anatomy
from llmprune.calibration import fingerprint_tokens, load_windows
from llmprune.errors import CalibrationError, ModelError
from llmprune.model.loading import dense_decoder, identity, load_config, load_model, load_tokenizer
from llmprune.model.walk import Decoder
from llmprune.recipe import Recipe
from llmprune.run import fingerprint


class Workbench:
    """The dense model and the calibration windows of one recipe."""

    def __init__(self, recipe: Recipe, anatomy: Anatomy) -> None:
        self.recipe = recipe
        self.anatomy = anatomy

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None where it has none, which only ready tokens can do without."""
        try:
            return load_tokenizer(self.recipe.model)
        except ModelError:
            needed = self.recipe.calibration.tokens is None or self.recipe.evaluation.tasks
            if needed:
                raise
            return None

    @cached_property
    def windows(self) -> Tensor:
        """Calibration tokens int64 [N, L], known to the model's vocabulary."""
        calibration = self.recipe.calibration
        windows_NL = load_windows(calibration, self.tokenizer, calibration.shape())
        self.require_known(windows_NL)
        return windows_NL

    def require_known(self, windows_NL: Tensor) -> None:
        """Raise CalibrationError for token ids that the model has no embedding for."""
        vocabulary = text_config(self.config).vocab_size
        largest, least = int(windows_NL.max()), int(windows_NL.min())
        if largest >= vocabulary or least < 0:
            raise CalibrationError(
                f"the tokens go from {least} to {largest} and the model knows 0 to {vocabulary - 1}; "
                "tokenise the text with this model's tokenizer"
            )

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
    def config(self) -> Config:
        """The dense model's config."""
        return load_config(self.recipe.model)

    @property
    def commit(self) -> str | None:
        """The hub commit that the model was loaded from; None for a folder."""
        return getattr(self.config, "_commit_hash", None)

    @cached_property
    def identity(self) -> str:
        """What every product depends on: the base model as it is, and the arithmetic."""
        base = identity(self.recipe.model, self.config)
        return fingerprint(base, self.recipe.model.dtype, torch.__version__)

    @property
    def device(self) -> str:
        """The hardware that computes, in words."""
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
