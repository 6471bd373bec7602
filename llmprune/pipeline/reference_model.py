"""The model that the pruned one is trained towards and compared with, under the token ids of the pruned one."""

from __future__ import annotations

from functools import cached_property

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmprune.anatomy.renumbered_tokens import renumber_tokens
from llmprune.anatomy.vocabulary import new_ids_of
from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.location import identity
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.evaluation.decoding import end_tokens
from llmprune.layerwise.decoder import Decoder
from llmprune.planning.reference import ids_in_reference
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder.fingerprints import code_fingerprint, fingerprint


class ReferenceModel:
    """The reference of a recipe: the dense model, or another one by ``against``, which may have more tokens.

    ``working``: bytes to leave free on each GPU.
    """

    def __init__(self, recipe: Recipe, *, working: dict[int, int]) -> None:
        self._recipe, self.source = recipe, recipe.reference
        self._working = working

    @cached_property
    def tokens(self) -> Tensor | None:
        """Id of each token of the pruned model in the reference, int64 [K]; None where all are the same."""
        if self.source == self._recipe.model:
            return None
        ids = ids_in_reference(self._recipe)
        return None if ids is None else torch.tensor(ids)

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the reference, its tokens, the arithmetic, libraries and code."""
        tokens = [] if self.tokens is None else [self.tokens.tolist()]
        libraries = torch.__version__, transformers.__version__
        own = identity(self.source), self._recipe.model.dtype
        return fingerprint(*own, *libraries, code_fingerprint(), *tokens)

    def open(self) -> Decoder:
        """Return a decoder of the reference that takes and predicts the tokens of the pruned model."""
        decoder = open_decoder(self.source, working=self._working)
        if self.tokens is not None:
            renumber_tokens(decoder.skeleton, self.tokens)
        return decoder

    def load(self) -> PreTrainedModel:
        """Load the whole reference, with the tokens of the pruned model; an end token that this lacks ends no text."""
        model = load_model(self.source)
        if self.tokens is not None:
            renumber_tokens(model, self.tokens)
            new_ids = new_ids_of(self.tokens)
            ends = [new_ids[index] for index in end_tokens(model) if index in new_ids]
            model.generation_config = GenerationConfig(eos_token_id=ends)
        return model
