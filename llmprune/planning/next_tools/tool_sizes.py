"""Tools that the planned shape allows: degrees of parallelism, sizes of quantisation groups, k-quants.

A run of the pruned model on several GPUs cuts heads, MLP neurons and experts into equal parts (Megatron-LM, arXiv
1909.08053; vLLM refuses others); a quantiser with one scale for a group of inputs needs whole groups in every part.
llama.cpp's k-quants need rows of whole blocks of 256 and fall back to Q5_0 or Q8_0 for others.

Sizes are those of the model's own modules and of its anatomy. The parts of linear attention and of state-space layers,
which no cut changes, are not among those that parallelism divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.projections import projections_of
from llmprune.recipe.width_rounding import K_QUANT_ROW
from llmprune.results.figures.next_tools import Degrees, NextTools, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.anatomy.types import Anatomy

DEGREES = (1, 2, 4, 8, 16)
GROUPS = (32, 64, 128)
FP8_BLOCK = 128


@dataclass(frozen=True)
class ToolSizes:
    """Sizes of a model that tools divide.

    ``units``: (output projection, config field, multiple of the field's value) of each kind of MLP; ``widths``: values
    of the fields; ``outputs``: inputs that each key-value group has in attention's output projections, by their names;
    ``head_dim``: of a key-value head; ``rows``: inputs of all other projections.
    """

    hidden: int
    vocabulary: int
    units: tuple[tuple[str, str, int], ...]
    widths: Mapping[str, int]
    kv_groups: int | None
    queries: int  # query heads of a group
    head_dim: int
    outputs: Mapping[str, int]
    experts: int | None
    rows: Mapping[str, int]

    def tensor_parallel(self, degree: int) -> bool:
        """Check that heads and neurons can be divided; fewer key-value heads than GPUs are repeated."""
        groups = self.kv_groups
        divides = groups is None or (
            groups * self.queries % degree == 0 and (groups % degree == 0 or degree % groups == 0)
        )
        return divides and self._whole(self._neurons(), degree)

    def expert_parallel(self, degree: int) -> bool:
        """Check that the experts can be divided."""
        return self.experts is not None and self.experts % degree == 0

    def equal_vocabulary(self, degree: int) -> bool:
        """Check that the rows of embeddings and head can be divided."""
        return self.vocabulary % degree == 0

    def grouped(self, size: int, degree: int) -> bool:
        """Check that groups of ``size`` inputs stay whole: over the inputs of down and output projections, by GPU."""
        divided = [*self._neurons(), *self._attention_outputs()]
        return self.tensor_parallel(degree) and self.hidden % size == 0 and self._whole(divided, degree * size)

    def in_blocks(self, degree: int) -> bool:
        """Check that FP8 blocks stay whole, of inputs and of outputs."""
        if not self.grouped(FP8_BLOCK, degree):
            return False
        return self.kv_groups is None or self.head_dim * max(self.kv_groups // degree, 1) % FP8_BLOCK == 0

    def broken_rows(self) -> dict[str, int]:
        """Return the matrices whose rows are no multiple of a k-quant's block, with the inputs of each."""
        rows = dict(self.rows)
        rows |= {name: self.widths[field] * times for name, field, times in self.units}
        if self.kv_groups is not None:
            rows |= {name: inputs * self.kv_groups for name, inputs in self.outputs.items()}
        return {name: length for name, length in sorted(rows.items()) if length % K_QUANT_ROW}

    def _neurons(self) -> list[int]:
        """Return the widths of all MLPs, those of fields without a unit among them."""
        counted = {field for _, field, _ in self.units}
        others = [width for field, width in self.widths.items() if field not in counted]
        return [self.widths[field] * times for _, field, times in self.units] + others

    def _attention_outputs(self) -> list[int]:
        return [inputs * self.kv_groups for inputs in self.outputs.values()] if self.kv_groups is not None else []

    @staticmethod
    def _whole(sizes: Iterable[int], divisor: int) -> bool:
        return all(size % divisor == 0 for size in sizes)


def sizes_for_tools(model: PreTrainedModel, anatomy: Anatomy) -> ToolSizes:
    """Return the sizes of a dense model, which may be on the meta device."""
    text, heads = text_config(model.config), anatomy.heads
    units = {(unit.output, unit.field, unit.times) for units in anatomy.units for unit in units}
    outputs = {unit.output: unit.width // heads.count for unit in anatomy.attention if unit and heads}
    queries = heads.queries if heads else 1
    rows: dict[str, int] = {}
    for one in (one for layer in find_layers(model)[1] for one in projections_of(layer)):
        if rows.get(one.name, 0) % K_QUANT_ROW == 0:  # of layers that differ, one whose rows are broken
            rows[one.name] = one.inputs
    counted = outputs.keys() | {name for name, _, _ in units}
    return ToolSizes(
        hidden=text.hidden_size,
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        units=tuple(sorted(units)),
        widths={group.field: group.width for group in anatomy.groups},
        kv_groups=heads.count if heads else None,
        queries=queries,
        head_dim=getattr(text, "head_dim", None) or (text.hidden_size // (heads.count * queries) if heads else 1),
        outputs=outputs,
        experts=anatomy.experts.count if anatomy.experts else None,
        rows={name: inputs for name, inputs in rows.items() if name not in counted},
    )


def cut_sizes(dense: ToolSizes, kept: KeptSizes) -> ToolSizes:
    """Return the sizes after a cut. Residual channels are the inputs of every projection with as many."""
    cut = replace(
        dense,
        widths={**dense.widths, **kept.widths},
        kv_groups=kept.kv_groups or dense.kv_groups,
        experts=kept.experts or dense.experts,
    )
    if kept.hidden is None:
        return cut
    rows = {name: kept.hidden if inputs == dense.hidden else inputs for name, inputs in dense.rows.items()}
    return replace(cut, hidden=kept.hidden, rows=rows)


def next_tools(dense: ToolSizes, pruned: ToolSizes) -> NextTools:
    """Return the tools that a pruned model's sizes allow, and those that only the dense model's do."""
    broken, whole = pruned.broken_rows(), dense.broken_rows()
    return NextTools(
        tensor_parallel=_degrees(dense, pruned, allows=ToolSizes.tensor_parallel),
        expert_parallel=_degrees(dense, pruned, allows=ToolSizes.expert_parallel) if pruned.experts else None,
        vocabulary=_degrees(dense, pruned, allows=ToolSizes.equal_vocabulary),
        groups={size: _degrees(dense, pruned, allows=partial(_grouped, size=size)) for size in GROUPS},
        fp8_blocks=_degrees(dense, pruned, allows=ToolSizes.in_blocks),
        k_quants=Rows(broken=broken, lost={name: row for name, row in broken.items() if name not in whole}),
    )


def with_tokens(found: NextTools, *, dense: int, kept: int) -> NextTools:
    """Return the tools of a shape whose vocabulary has ``kept`` of ``dense`` tokens."""
    allowed = tuple(degree for degree in DEGREES if kept % degree == 0)
    lost = tuple(degree for degree in DEGREES if degree not in allowed and dense % degree == 0)
    return found.model_copy(update={"vocabulary": Degrees(allowed=allowed, lost=lost)})


def _grouped(sizes: ToolSizes, degree: int, *, size: int) -> bool:
    return sizes.grouped(size, degree)


def _degrees(dense: ToolSizes, pruned: ToolSizes, *, allows: Callable[[ToolSizes, int], bool]) -> Degrees:
    allowed = tuple(degree for degree in DEGREES if allows(pruned, degree))
    return Degrees(allowed=allowed, lost=tuple(d for d in DEGREES if d not in allowed and allows(dense, d)))
