"""The tokenizer of a run and its texts as token windows. No weights are read here."""

from __future__ import annotations

import logging
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import Config, text_config
from llmprune.checkpoint.loading import load_config, load_tokenizer
from llmprune.common.errors import CalibrationError, ModelError, RecipeError
from llmprune.data.windows import TextWindows, load_windows, sources_of_windows
from llmprune.evaluation.prompts import ModelLimits, Prompts, make_prompts
from llmprune.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


class TextInputs:
    """Tokenizer, calibration windows and held-out windows of one recipe, each read when first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def needs_tokenizer(self) -> bool:
        """True if the recipe reads or writes text; files of ready tokens alone need no tokenizer."""
        evaluation = self.recipe.evaluation
        texts = [self.recipe.calibration, evaluation.perplexity]
        return bool(evaluation.task_names or evaluation.requires_generation) or any(
            windows is not None and windows.tokens is None for windows in texts
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None where the model has none and the recipe needs none."""
        try:
            return load_tokenizer(self.recipe.model)
        except ModelError as error:
            if self.needs_tokenizer:
                raise
            logger.warning("no tokenizer is loaded: %s", error)
            return None

    @property
    def windows(self) -> Tensor:
        """Calibration tokens, int64 [N, L]: all in the model's vocabulary, and no window longer than its positions."""
        return self._calibration.windows_NL

    @property
    def crossings(self) -> int | None:
        """The number of calibration windows that hold parts of several documents; None for ready tokens."""
        return self._calibration.crossings

    @cached_property
    def _calibration(self) -> TextWindows:
        calibration = self.recipe.calibration
        loaded = load_windows(calibration, self.tokenizer, default_shape=calibration.shape())
        self._require_fitting(loaded.windows_NL)
        return loaded

    @property
    def sources(self) -> Tensor | None:
        """Index of the source of each calibration window, int64 [N]; None for ready tokens."""
        return sources_of_windows(self.recipe.calibration, self.recipe.calibration.shape())

    @cached_property
    def held_out(self) -> Tensor | None:
        """Tokens for perplexity, int64 [N, L]; None where the recipe does not measure it."""
        settings = self.recipe.evaluation.perplexity
        if settings is None:
            return None
        windows_NL = load_windows(settings, self.tokenizer, default_shape=settings.shape()).windows_NL
        self._require_fitting(windows_NL)
        return windows_NL

    @cached_property
    def prompts(self) -> Prompts | str | None:
        """Prompts of the generation check; a sentence why it is left out; None where the recipe turns it off.

        Raises RecipeError where the recipe asks for the check itself and there can be no prompts.
        """
        evaluation, config = self.recipe.evaluation, text_config(self.config)
        if evaluation.generation is None:
            return None
        limits = ModelLimits(getattr(config, "max_position_embeddings", None), config.vocab_size)
        try:
            return make_prompts(evaluation.generation, self.tokenizer, held_out_NL=self.held_out, limits=limits)
        except RecipeError as error:
            if evaluation.requires_generation:
                raise
            return f"the answers of both models were not compared: {error}"

    @cached_property
    def config(self) -> Config:
        """The dense model's config."""
        return load_config(self.recipe.model)

    def require_positions(self, length: int) -> None:
        """Raise CalibrationError where windows of ``length`` tokens exceed the model's positions."""
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
                f"the token ids range from {least} to {largest} and the model knows 0 to {vocabulary - 1}; "
                "tokenise the text with this model's tokenizer"
            )
        self.require_positions(windows_NL.shape[1])
