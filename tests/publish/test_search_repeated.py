"""A model whose shape was searched, repeated from its record: the recorded shape, without another search."""

from __future__ import annotations

from pathlib import Path

from helpers.reports import sample_report
from helpers.searching import searched

from llmprune.publish.plots import draw
from llmprune.publish.provenance import FILE, Record, portable_figures
from llmprune.publish.reproduce import recorded_recipe

RECIPE = """\
model: {id: org/base}
calibration: {dataset: org/text}
budget:
  parameters: [0.9, 0.8]
  axes: {layers: {}, mlp: {criterion: {kind: wanda}}, heads: {}}
"""


def test_the_recorded_shape_is_cut_again(tmp_path: Path) -> None:
    """The budget is replaced by the shape of this member of the family; criteria of the axes are kept."""
    found = searched(0.9, 0.8, member=1)
    record = Record(
        created="today",
        recipe=RECIPE,
        overrides=(),
        cut={},
        fingerprints={},
        files={},
        refused=None,
        report=portable_figures(sample_report(search=found)),
    )
    (tmp_path / FILE).write_text(record.to_json())
    recipe, _ = recorded_recipe(str(tmp_path))
    shape = found.chosen_shape(1)
    assert recipe.budget is None
    assert recipe.depth is not None
    assert recipe.depth.layers == shape.removed
    assert recipe.width is not None
    assert recipe.width.neurons == shape.widths["intermediate_size"]
    assert recipe.width.heads == shape.kv_groups
    assert recipe.width.neuron_criterion.kind == "wanda"


def test_the_frontier_is_drawn_for_the_card(tmp_path: Path) -> None:
    """A chart is written where the report has a search."""
    assert "frontier" in draw(sample_report(search=searched()), tmp_path)
    assert "frontier" not in draw(sample_report(), tmp_path)
