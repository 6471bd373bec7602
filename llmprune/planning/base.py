"""The dense model of a plan, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hidden_size import find_hidden_size
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.meta_model import Config, build_meta_model
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.language_model_check import require_language_model
from llmprune.checkpoint.loading import compute_dtype
from llmprune.checkpoint.location import headers_of, quantization_of_source, reads_pickles
from llmprune.checkpoint.quantized.formats import Quantization
from llmprune.checkpoint.stored_dtypes import describe_types, require_all
from llmprune.checkpoint.weight_headers import Headers
from llmprune.common.linalg.precision import dtype_name
from llmprune.planning.notes.base_model import about_quantization, about_unread_weights
from llmprune.planning.sizes.model_size import measure_size
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.model_size import Size


@dataclass(frozen=True)
class Base:
    """The dense model without its weights. ``headers``: of its weights files; None where they are not available.

    ``has_files``: False for a model that a round before will make.
    """

    config: Config
    headers: Headers | None
    dense: PreTrainedModel
    anatomy: Anatomy
    has_files: bool = True
    quantization: Quantization | None = None  # of the weights files

    @cached_property
    def names(self) -> FileNames:
        """The mapping from the model's tensors to those of the files."""
        return FileNames(self.dense, self.headers or {}, quantization=self.quantization)

    @cached_property
    def size(self) -> Size:
        """Sizes of the dense model."""
        return measure_size(self.dense, KeptSizes.of_dense(self.anatomy), stored=self.names.dtypes)

    def about_types(self, recipe: Recipe) -> list[str]:
        """Return notes on the types of the result's tensors."""
        dtype, notes = self.dense.dtype, []
        if recipe.model.pickles and not reads_pickles(recipe.model):
            notes = [f"model.pickles has no effect: the weights of {recipe.model.id} are not read from pickles"]
        if self.headers:
            types = describe_types(self.names, dtype, keep=recipe.model.dtype == "auto")
            return [*notes, *about_quantization(self.names), *types]
        none, parameters = self.headers is not None, self.size.parameters
        return [*notes, about_unread_weights(recipe, dtype_name(dtype), parameters=parameters, none=none)]


def describe_base(recipe: Recipe, config: Config) -> Base:
    """Return the dense model of a recipe. Raises ModelError where it is no language model or cannot be pruned."""
    headers, trust = headers_of(recipe.model), recipe.model.trust_remote_code
    require_language_model(recipe.model, headers)
    anatomy = discover(config, trust)
    if recipe.hidden is not None:
        anatomy = replace(anatomy, hidden=find_hidden_size(config, anatomy, trust_remote_code=trust))
    dtype = compute_dtype(recipe.model, config, found=headers)
    dense = build_meta_model(config, dtype, trust_remote_code=trust)
    return Base(config, headers, dense, anatomy, quantization=quantization_of_source(recipe.model))


def require_complete(recipe: Recipe, base: Base) -> None:
    """Raise CheckpointError where the files lack tensors of the model, or have others."""
    if base.headers:
        require_all(base.names, recipe.model.id)
