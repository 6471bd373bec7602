"""Notes on the base model: parts that are not pruned, quantized weights, weights that were not read."""

from __future__ import annotations

from llmprune.anatomy.meta_model import Config, text_config
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.location import conversion_of, is_on_hub
from llmprune.common.linalg.precision import dtype_name
from llmprune.common.schema import format_size
from llmprune.recipe.recipe import Recipe
from llmprune.results.formatting import plural


def about_base(recipe: Recipe, config: Config) -> list[str]:
    """Return notes on parts of the model that are not pruned, and on code that is run."""
    notes = []
    if text_config(config) is not config:
        notes.append("only the text part is pruned" + _about_images(recipe))
    if recipe.model.trust_remote_code:
        notes.append("the model's own Python code is run (model.trust_remote_code)")
    if "revision" in recipe.model.model_fields_set and not is_on_hub(recipe.model):
        notes.append(f"model.revision has no effect: {recipe.model.id} is on this machine; remove it")
    return notes


def _about_images(recipe: Recipe) -> str:
    """Return the rest of the note on a model that reads images."""
    seen = ", and it is scored on text and images" if recipe.calibration.has_images else ", and it is scored on text"
    if recipe.evaluation.backend is not None and recipe.evaluation.task_names:
        return seen
    return f"{seen}: its effect on images is not measured; evaluate a task with images by evaluation.backend"


def about_quantization(names: FileNames) -> list[str]:
    """Return a note on quantized weights of the base: their format, their size, and that of the result."""
    if names.quantization is None:
        return []
    stored = format_size(sum(tensor.nbytes for tensor in names.headers.values()))
    dtype = dtype_name(names.model.dtype)
    return [
        f"the base is quantized by {names.quantization.describe()}: {plural(names.quantized, 'tensor')}, {stored} with "
        f"all others in its files; each layer is dequantized to {dtype} when it is read, the sizes are those of "
        f"{dtype}, and the result is not quantized"
    ]


def about_unread_weights(recipe: Recipe, dtype: str, *, parameters: int, none: bool) -> str:
    """Return a note on the basis of the sizes where no weights file was read.

    ``parameters``: of the dense model; ``none``: the folder has no weights file.
    """
    conversion = conversion_of(recipe.model)
    if conversion is not None:
        return conversion.note.format(dtype=dtype, memory=format_size(4 * parameters))
    computed = f"the sizes assume that all tensors are {dtype}"
    if recipe.model.pickles and not none:
        return f"pickled weights are converted to safetensors once, before they are cut: {computed}"
    if none:
        return f"{recipe.model.id} has no safetensors weights file, which a run needs: {computed}"
    return f"no weights file was read: {computed}"
