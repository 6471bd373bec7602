"""The tokenizer of a run and its texts as token windows. No weights are read here."""

from __future__ import annotations

import copy
import logging
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import Config, text_config
from llmprune.checkpoint.loading import load_config, load_processor, load_tokenizer
from llmprune.common.errors import CalibrationError, ModelError, RecipeError
from llmprune.data.begin_of_text import required_begin
from llmprune.data.recovery_text import RecoverySources, UsedText, load_recovery_text
from llmprune.data.recovery_windows import Part, about_epochs
from llmprune.data.window_sources import source_names, sources_of_windows, with_generated
from llmprune.data.windows import TextWindows, load_windows
from llmprune.evaluation.prompts import ModelLimits, Prompts, make_prompts
from llmprune.planning.vocabulary.choice import ChosenVocabulary, choose_vocabulary
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


class TextInputs:
    """Tokenizer, calibration windows and held-out windows of one recipe, each read when first needed.

    All token ids of windows are in the model's vocabulary, and no window is longer than the model's positions.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._generated_NL = torch.empty(0, dtype=torch.int64)
        self._recovery: tuple[int, RecoverySources] | None = None  # windows of the training, and their text
        self.part = Part()  # of the training's text that the recipe trains on

    def of_round(self, recipe: Recipe, part: Part) -> TextInputs:
        """Return the inputs of one round of this recipe, with the tokenizer and the texts that were read already."""
        inputs = copy.copy(self)
        inputs.recipe, inputs.part = recipe, part
        for name in ("config", "prompts", *([] if recipe.vocabulary else ["vocabulary"])):
            inputs.__dict__.pop(name, None)
        return inputs

    @property
    def needs_tokenizer(self) -> bool:
        """True if the recipe reads or writes text; files of ready tokens alone need no tokenizer."""
        evaluation = self.recipe.evaluation
        recovery = self.recovery_settings if self.recipe.recover else None
        texts = [self.recipe.calibration, evaluation.perplexity, recovery]
        reads_text = evaluation.task_names or evaluation.requires_generation or self.recipe.vocabulary
        return bool(reads_text) or any(
            windows is not None and (windows.tokens is None or windows.bos is True) for windows in texts
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
    def has_own_tokenizer(self) -> bool:
        """True if the tokenizer is on this machine: a plan downloads only the config from the hub."""
        return Path(self.recipe.model.id).expanduser().is_dir()

    @property
    def text_windows(self) -> Tensor:
        """Calibration tokens that are read, int64 [N, L]; they fit the model's vocabulary and positions."""
        return self.calibration_text.windows_NL

    @property
    def windows(self) -> Tensor:
        """All calibration tokens, int64 [N, L], once the windows that the model writes itself were added."""
        calibration = self.recipe.calibration
        assert calibration.generated == len(self._generated_NL), "they are generated first"
        return with_generated(self.text_windows, self._generated_NL, seed=calibration.seed)

    def add_generated(self, generated_NL: Tensor) -> None:
        """Add the windows that the dense model wrote itself."""
        self._generated_NL = generated_NL

    @property
    def documents(self) -> tuple[int, ...] | None:
        """The number of documents in the windows of each source of text; None for ready tokens."""
        return self.calibration_text.documents

    @cached_property
    def calibration_text(self) -> TextWindows:
        """Calibration windows that are read, without those that the model writes itself."""
        calibration = self.recipe.calibration
        return self._fitting(
            load_windows(
                calibration,
                self.tokenizer,
                default_shape=calibration.read_shape(),
                processor=lambda: load_processor(self.recipe.model, self.config),
            )
        )

    @property
    def sources(self) -> Tensor | None:
        """Index of the source of each calibration window, int64 [N]; None where they have no known sources."""
        return sources_of_windows(self.recipe.calibration)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources that ``sources`` counts."""
        return source_names(self.recipe.calibration)

    @property
    def held_out(self) -> Tensor | None:
        """Tokens for perplexity, int64 [N, L]; None where the recipe does not measure it."""
        return self.held_out_text.windows_NL if self.held_out_text else None

    @cached_property
    def held_out_text(self) -> TextWindows | None:
        """Windows for perplexity; None where the recipe does not measure it."""
        settings = self.recipe.evaluation.perplexity
        if settings is None:
            return None
        return self._fitting(load_windows(settings, self.tokenizer, default_shape=settings.shape()))

    @cached_property
    def vocabulary(self) -> ChosenVocabulary | None:
        """The tokens that the recipe keeps; None where it keeps all. Raises RecipeError where it cannot remove any."""
        if self.recipe.vocabulary is None:
            return None
        assert self.tokenizer is not None, "the section needs one"
        return choose_vocabulary(self.recipe, self.tokenizer, config=self.config)

    @property
    def counted_vocabulary(self) -> ChosenVocabulary | None:
        """The tokens that the recipe keeps, if they are chosen already."""
        found: ChosenVocabulary | None = self.__dict__.get("vocabulary")
        return found

    @cached_property
    def recovery_settings(self) -> TokenWindows:
        """The text of the training after the cut, as it is read."""
        assert self.recipe.recover is not None, "the recipe has the section"
        return self.recipe.recover.data.resolved(self.recipe.calibration)

    def recovery_number(self, most: int | None = None) -> int:
        """Return the windows that the training takes, in all rounds together.

        ``most``: their number in one round, where the recipe gives ``hours``.
        """
        recover, length = self.recipe.recover, self.recovery_settings.sequence_length
        assert recover is not None, "the recipe has the section"
        assert length is not None, "resolved windows have a length"
        own, rounds = recover.of_round, recover.rounds * self.part.of
        if own.tokens is not None:
            return own.windows(own.tokens, length) * rounds
        assert most is not None, "a time does not give the number"
        return most * rounds

    def recovery_text(self, number: int) -> RecoverySources:
        """Return the windows of text for a training on ``number`` windows, the dense model's own left out.

        Raises CalibrationError where there is none that calibration and perplexity do not see.
        """
        if self._recovery is None or self._recovery[0] != number:
            recover, settings = self.recipe.recover, self.recovery_settings
            assert recover is not None, "the recipe has the section"
            assert settings.sequence_length is not None, "resolved windows have a length"
            used = [UsedText(self.recipe.calibration, self.calibration_text)]
            if self.recipe.evaluation.perplexity is not None and self.held_out_text is not None:
                used.append(UsedText(self.recipe.evaluation.perplexity, self.held_out_text))
            of_text = recover.windows_of_text(number, settings.sequence_length)
            text = load_recovery_text(settings, self.tokenizer, number=of_text, settings=recover, used=used)
            for source in text.sources:
                self._require_fitting(torch.cat([source.train_NL, source.held_out_HL]))
            self._recovery = number, text
        return self._recovery[1]

    @property
    def recovery_notes(self) -> tuple[str, ...]:
        """Notes on the training's text, where it has been read for all its windows."""
        recover = self.recipe.recover
        if recover is None or recover.tokens is None or self._recovery is None:
            return ()
        number, text = self._recovery
        if number != self.recovery_number():
            return ()
        length = self.recovery_settings.sequence_length or 0
        of_model = number - recover.windows_of_text(number, length)
        available = sum(len(source.train_NL) for source in text.sources) + of_model
        return (*text.notes, *about_epochs(number, available=available, length=length))

    @cached_property
    def prompts(self) -> Prompts | str | None:
        """Prompts of the generation check; a sentence why it is left out; None where the recipe turns it off.

        Raises RecipeError where the recipe asks for the check itself and there can be no prompts.
        """
        evaluation, config = self.recipe.evaluation, text_config(self.config)
        if evaluation.generation is None:
            return None
        bos = (evaluation.perplexity or self.recipe.calibration).bos
        begin = None if bos == "auto" else required_begin(bos, self.tokenizer)
        limits = ModelLimits(getattr(config, "max_position_embeddings", None), config.vocab_size)
        try:
            return make_prompts(
                evaluation.generation, self.tokenizer, held_out_NL=self.held_out, begin=begin, limits=limits
            )
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

    def _fitting(self, text: TextWindows) -> TextWindows:
        """Return ``text``. Raises CalibrationError for ids without an embedding, and windows beyond all positions."""
        images = text.images
        self._require_fitting(text.windows_NL if images is None else images.plain(text.windows_NL))
        return text

    def _require_fitting(self, windows_NL: Tensor) -> None:
        vocabulary = text_config(self.config).vocab_size
        largest, least = int(windows_NL.max()), int(windows_NL.min())
        if largest >= vocabulary or least < 0:
            raise CalibrationError(
                f"the token ids range from {least} to {largest} and the model knows 0 to {vocabulary - 1}; "
                "tokenise the text with this model's tokenizer"
            )
        self.require_positions(windows_NL.shape[1])
