"""Verification of a run's saved checkpoint in a fresh process, on the devices that the run has freed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprune.anatomy.projections import projections_of
from llmprune.anatomy.stacked_projections import StackedProjection, stacked_projections
from llmprune.anatomy.types import MlpUnit, routed_units
from llmprune.checkpoint.placement import device_map_of, device_map_of_whole
from llmprune.checkpoint.result.pruned_source import pruned_source
from llmprune.checkpoint.result.verify import Loading, Probe, SparseClaim, Verified, verify
from llmprune.common.errors import ModelError
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Decoder
from llmprune.pipeline.context import RunContext
from llmprune.prune.records import LayerRecord
from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity.pattern import ROUNDING


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint in ``folder``, and what it must be.

    ``probe``: logits of the model in memory; ``decoder``: of the same structure; ``records``: of pass 2.
    """

    folder: Path
    probe: Probe
    decoder: Decoder
    parameters: int
    records: tuple[LayerRecord, ...]


def verify_saved(context: RunContext, cut: Cut, *, saved: SavedModel, free: dict[int, int]) -> Verified:
    """Load a checkpoint in a fresh process and compare it with the model in memory.

    ``free``: bytes of the GPUs that it may use. Raises VerificationError where they differ, ModelError where no matrix
    could be made sparse.
    """
    recipe, skeleton = context.recipe, saved.decoder.skeleton
    source = pruned_source(recipe.model, saved.folder, layers=cut.layers)
    return verify(
        saved.folder,
        saved.probe,
        parameters=saved.parameters,
        dtype=context.inputs.dtype,
        loading=Loading(
            device_map_of_whole(source, skeleton, free=free),
            recipe.model.trust_remote_code,
            on_cpu=device_map_of(source.model_copy(update={"device_map": "cpu"}), skeleton),
        ),
        claim=_sparse_claim(
            recipe.sparsity,
            saved.decoder,
            records=saved.records,
            units=[routed_units(context.inputs.anatomy, old) for old in cut.layers],
        )
        if recipe.sparsity
        else None,
    )


def _sparse_claim(
    sparsity: Sparsity,
    pruned: Decoder,
    *,
    records: Sequence[LayerRecord],
    units: Sequence[Sequence[MlpUnit]],
) -> SparseClaim:
    """Return the zeros that the saved file must hold. Raises ModelError where no matrix could be made sparse.

    ``units``: of every kept layer.
    """
    matrices = []
    weights = 0
    for index, record in enumerate(records):
        layer = pruned.layers[index]
        stacks = {stack.name: stack for stack in stacked_projections(layer, units[index])}
        projections = {projection.name: projection for projection in projections_of(layer)}
        for matrix in record.matrices:
            one = stacks.get(matrix.name) or projections[matrix.name]
            matrices.append((f"{pruned.layers_path}.{index}.{one.name}", one.transposed))
            weights += one.outputs * one.inputs * (one.experts if isinstance(one, StackedProjection) else 1)
    if not matrices:
        raise ModelError("no matrix was made sparse: this model calls none of them exactly once; remove sparsity")
    pattern = sparsity.parsed
    least = 0 if pattern.of else int(weights * (pattern.share - ROUNDING))
    return SparseClaim(tuple(matrices), weights, pattern.kept, pattern.of, least)
