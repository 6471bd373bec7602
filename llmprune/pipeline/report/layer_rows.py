"""Rows of a report's layer table: what each layer of the dense model lost, and what its repair reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from llmprune.anatomy.types import Anatomy, MlpUnit, unit_key
from llmprune.cut.decision import Cut, kept_share
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.report.run_results import RunResults
from llmprune.prune.records import LayerRecord
from llmprune.results.figures.layers import BlockFigures, LayerFigures, MatrixFigures
from llmprune.score.scores import Scores


def layer_figures(context: RunContext, results: RunResults) -> tuple[LayerFigures, ...]:
    """Return one row for every layer of the dense model."""
    width, cut = context.recipe.width, results.chosen.cut
    rows = _LayerRows(
        anatomy=context.inputs.anatomy,
        scores=results.scores,
        cut=cut,
        records={record.layer: record for record in results.pruned.records},
        are_neurons_additive=width.neuron_criterion.is_additive if width else True,
        are_heads_additive=width.head_criterion.is_additive if width else True,
    )
    return tuple(rows.row(index) for index in range(cut.num_layers))


@dataclass(frozen=True)
class _LayerRows:
    """Rows of the layer table. ``records``: results of pass 2 by kept layer."""

    anatomy: Anatomy
    scores: Scores | None
    cut: Cut
    records: Mapping[int, LayerRecord]
    are_neurons_additive: bool
    are_heads_additive: bool

    def row(self, index: int) -> LayerFigures:
        """Return the figures of one layer of the dense model."""
        removed, units = index in self.cut.removed, self.anatomy.units[index]
        scores, record = self.scores, self.records.get(index)
        block, attention = self.anatomy.blocks[index], self.anatomy.attention[index]
        keep_E = self.cut.experts.get(unit_key(index, block.path)) if block else None
        heads = unit_key(index, attention.path) if attention else ""
        keep_G = None if removed else self.cut.heads.get(heads)
        return LayerFigures(
            layer=index,
            importance=float(scores.layers[index]) if scores and scores.layers is not None else None,
            removed=removed,
            width=sum(unit.width * (unit.experts or 1) for unit in units) if units else None,
            kept=sum(self._kept(index, unit, keep_E=keep_E) for unit in units) if units and not removed else None,
            experts_kept=None if keep_E is None or removed else tuple(keep_E.tolist()),
            kv_groups_kept=None if keep_G is None else tuple(keep_G.tolist()),
            kv_groups_share=None
            if keep_G is None or scores is None or scores.by_source
            else kept_share(scores.heads[heads], keep_G, is_additive=self.are_heads_additive),
            score_share=None if removed or scores is None or scores.by_source else self._score_share(index, scores),
            error_cut=record.error_cut if record else None,
            error_refit=record.error_refit if record else None,
            ridge=record.ridge if record else None,
            inherited=record.inherited if record else None,
            held_out=record.held_out if record else None,
            mixer_held_out=record.mixer_held_out if record else None,
            up_held_out=record.up_held_out if record else None,
            block=BlockFigures(**asdict(record.block)) if record and record.block else None,
            matrices=tuple(MatrixFigures(**asdict(one)) for one in record.matrices) if record else (),
        )

    def _kept(self, index: int, unit: MlpUnit, *, keep_E: Tensor | None) -> int:
        """Count the kept neurons of a unit, over all its kept experts. ``keep_E``: indices of kept experts."""
        keep = self.cut.neurons.get(unit_key(index, unit.path))
        experts = 1 if unit.experts is None else unit.experts if keep_E is None else len(keep_E)
        return experts * (unit.width if keep is None else keep.shape[-1])

    def _score_share(self, index: int, scores: Scores) -> float | None:
        """Mean share of the neurons' score that is kept, over the layer's units that lost neurons."""
        keys = [unit_key(index, unit.path) for unit in self.anatomy.units[index]]
        shares = [
            kept_share(scores.neurons[key], self.cut.neurons[key], is_additive=self.are_neurons_additive)
            for key in keys
            if key in self.cut.neurons
        ]
        return sum(shares) / len(shares) if shares else None
