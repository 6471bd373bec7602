"""Open a model as a decoder whose layers come from the files, whatever the size of the model.

No layer is loaded before a layer-wise pass reaches it. Then its tensors are read from the memory-mapped files,
converted as transformers converts them, and brought to the device that computes. A process holds one layer, and the
pages of the files are shared by all processes of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import build_meta_model
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.layers_in_files import LayersInFiles
from llmprune.checkpoint.loading import compute_dtype, load_config, no_weights
from llmprune.checkpoint.location import folder_of, quantization_of_source
from llmprune.checkpoint.placement import place
from llmprune.checkpoint.skeleton import fill_rest
from llmprune.checkpoint.stored_dtypes import require_all
from llmprune.checkpoint.weight_headers import SINGLE, headers_of_folder
from llmprune.checkpoint.weights_reader import WeightsReader
from llmprune.common.errors import CheckpointError
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.recipe.model import ModelSource


def open_reader(source: ModelSource) -> WeightsReader:
    """Open the weights files of a model.

    Raises ModelError where there is no such model, CheckpointError where its files do not have the tensors of its
    config: transformers would fill missing ones with random numbers.
    """
    folder = folder_of(source, "weights")
    config, headers = load_config(source), headers_of_folder(folder, source.id)
    if not headers:
        raise no_weights(source, f"no {SINGLE} in {folder}")
    dtype = compute_dtype(source, config, found=headers)
    model = build_meta_model(config, dtype, trust_remote_code=source.trust_remote_code)
    model.config.name_or_path = str(folder)  # the text part of a config may have another path
    names = FileNames(model, headers, quantization=quantization_of_source(source))
    require_all(names, source.id)
    return WeightsReader(names, folder, shown=source.id)


def open_decoder(
    source: ModelSource, reader: WeightsReader | None = None, *, working: Mapping[int, int] | None = None
) -> Decoder:
    """Return a model as a decoder: its modules outside the layers loaded, its layers read when they are visited.

    ``reader``: of the model's files, by default opened here; its model without weights becomes the decoder's skeleton.
    ``working``: bytes to leave free on each GPU for everything but weights that stay there. Raises as ``open_reader``,
    and RecipeError where the device map does not fit the model.
    """
    reader = reader or open_reader(source)
    skeleton = reader.names.model
    placement = place(source, skeleton, working=working)
    layers = LayersInFiles(skeleton, reader)
    rest = layers.read_rest()
    _require_one_matrix(skeleton, rest, shown=source.id)
    fill_rest(skeleton, rest, device=placement.rest, missing=layers.absent(rest))
    skeleton._weight_conversions = reader.names.used_rules or None
    return Decoder(
        skeleton,
        layers.read,
        placement=placement.layers,
        prefetch=layers.prefetch,
        quick=True,
    )


def _require_one_matrix(skeleton: PreTrainedModel, rest: Tensors, *, shown: str) -> None:
    """Raise CheckpointError where the config ties two matrices and the files have different values for them.

    transformers 5 then loads both and warns, transformers 4 and vLLM drop one: they would run another model.
    """
    for name, other in skeleton.all_tied_weights_keys.items():
        if name in rest and other in rest and not torch.equal(rest[name], rest[other].to(rest[name].dtype)):
            raise CheckpointError(
                f"the config of {shown} ties {name} to {other} (tie_word_embeddings: true), and its weights files have "
                "different values for the two; set tie_word_embeddings to false in its config.json if both were trained"
            )
