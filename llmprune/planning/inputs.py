"""The texts of a run as tokens, with the tokenizer that makes them; nothing here reads weights."""

from __future__ import annotations

import logging
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import Config, text_config
from llmprune.checkpoint.loading import load_config, load_tokenizer
from llmprune.common.errors import CalibrationError, ModelError
from llmprune.data.windows import load_windows, sources_of_windows
from llmprune.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


class Inputs:
    """Tokenizer, calibration windows and held-out windows of one recipe, each read when first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the recipe reads or writes text; ready tokens alone need no tokenizer."""
        evaluation = self.recipe.evaluation
        texts = [self.recipe.calibration, evaluation.perplexity]
        return bool(evaluation.tasks or evaluation.generation) or any(
            windows is not None and windows.tokens is None for windows in texts
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None where it has none and the recipe needs none."""
        try:
            return load_tokenizer(self.recipe.model)
        except ModelError as error:
            if self.needs_tokenizer:
                raise
            logger.warning("no tokenizer is loaded: %s", error)
            return None

    @property
    def windows(self) -> Tensor:
        """Calibration tokens int64 [N, L], known to the model's vocabulary and within its positions."""
        return self._calibration[0]

    @property
    def crossings(self) -> int | None:
        """How many calibration windows hold parts of several documents; None of ready tokens."""
        return self._calibration[1]

    @cached_property
    def _calibration(self) -> tuple[Tensor, int | None]:
        calibration = self.recipe.calibration
        windows_NL, crossings = load_windows(calibration, self.tokenizer, default_shape=calibration.shape())
        self._require_fitting(windows_NL)
        return windows_NL, crossings

    @property
    def sources(self) -> Tensor | None:
        """Which source each calibration window is from, int64 [N]; None for ready tokens."""
        return sources_of_windows(self.recipe.calibration, self.recipe.calibration.shape())

    @cached_property
    def held_out(self) -> Tensor | None:
        """Tokens for perplexity int64 [N, L]; None where the recipe asks for none."""
        settings = self.recipe.evaluation.perplexity
        if settings is None:
            return None
        windows_NL, _ = load_windows(settings, self.tokenizer, default_shape=settings.shape())
        self._require_fitting(windows_NL)
        return windows_NL

    @cached_property
    def config(self) -> Config:
        """The dense model's config."""
        return load_config(self.recipe.model)

    def require_positions(self, length: int) -> None:
        """Raise CalibrationError where windows of this length exceed the model's positions."""
        positions = getattr(text_config(self.config), "max_position_embeddings", None)
        if positions and length > positions:
            raise CalibrationError(
                f"windows of {length} tokens are longer than the model's {positions} positions; "
                f"set sequence_length to at most {positions}"
            )

    def _require_fitting(self, windows_NL: Tensor) -> None:
        """Raise CalibrationError for token ids without an embedding, and for windows beyond the model's positions."""
        vocabulary = text_config(self.config).vocab_size
        largest, least = int(windows_NL.max()), int(windows_NL.min())
        if largest >= vocabulary or least < 0:
            raise CalibrationError(
                f"the tokens go from {least} to {largest} and the model knows 0 to {vocabulary - 1}; "
                "tokenise the text with this model's tokenizer"
            )
        self.require_positions(windows_NL.shape[1])
