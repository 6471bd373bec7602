"""Count the sizes of any shape of a model, from the tensors of the dense model and the dimensions that a cut shortens.

No model is built for a shape: every tensor of a layer shrinks in proportion to the units that its dimensions have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.config_probe import rebuild
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.layer_kinds import follow_from, kinds_of
from llmprune.anatomy.meta_model import build_meta_model, find_layers
from llmprune.anatomy.types import Anatomy, PrunableDim
from llmprune.cut.shape import Shape
from llmprune.planning.base import Base
from llmprune.planning.sizes.model_size import cache_bytes_by_layer
from llmprune.planning.sizes.planned_layers import planned_layers
from llmprune.planning.vocabulary.plan import TokenSizes
from llmprune.recipe.depth import Depth


@dataclass(frozen=True)
class ShapeSizes:
    """Sizes of a shape.

    ``active_parameters``: those that one token uses, of routed experts and their router's rows only the top k, so that
    it does not depend on the number of experts. ``bytes``: of the files. ``kv_bytes_per_token``: None where the cache
    cannot be counted without weights.
    """

    parameters: int
    active_parameters: int
    bytes: int
    kv_bytes_per_token: int | None


@dataclass(frozen=True)
class _Kind:
    """Tensors that shrink alike. ``field``: config field of the width that they follow; ``itemsize``: in the files.

    ``routed``: stacks of experts, or rows of a router, of which a token uses only the top k.
    """

    field: str | None
    by_groups: bool
    by_experts: bool
    routed: bool
    itemsize: int


@dataclass(frozen=True)
class _Cache:
    """Bytes of one token in each layer's key-value cache: with all key-value groups, and for each group less."""

    dense: tuple[int, ...]
    per_group: tuple[int, ...]


class ShapeCounter:
    """Exact sizes of the shapes of one model. They depend on which layers are removed only if layers differ in size."""

    def __init__(self, base: Base, *, token: TokenSizes | None = None, trust_remote_code: bool = False) -> None:
        """Count the tensors of the dense model. ``token``: sizes of a token, None where all tokens are kept."""
        self.anatomy, self._token = base.anatomy, token
        path, layers = find_layers(base.dense)
        self._by_layer = [Counter[_Kind]() for _ in layers]
        outside: list[tuple[int, int]] = []  # elements and bytes of an element
        for name, tensor in base.dense.named_parameters():  # tied ones once
            itemsize = base.names.dtypes.get(name, tensor.dtype).itemsize
            if not name.startswith(f"{path}."):
                outside.append((tensor.numel(), itemsize))
                continue
            index, _, inside = name.removeprefix(f"{path}.").partition(".")
            kind = _kind_of(self.anatomy, int(index), name=inside, tensor=tensor, itemsize=itemsize)
            self._by_layer[int(index)][kind] += tensor.numel()
        self._outside = sum(count for count, _ in outside), sum(count * itemsize for count, itemsize in outside)
        self._cache = _count_cache(base, trust_remote_code=trust_remote_code)
        self._sums: dict[tuple[int, ...], Counter[_Kind]] = {}

    @property
    def dense(self) -> Shape:
        """Shape of the dense model."""
        dense = KeptSizes.of_dense(self.anatomy)
        return Shape(len(dense.layers), tuple(sorted(dense.widths.items())), dense.kv_groups, dense.experts)

    @property
    def is_exact(self) -> bool:
        """True where layers that may take each other's place have one size, so that any removal has the same sizes."""
        kinds, cache = kinds_of(self.anatomy.by_index, self.anatomy.num_layers), self._cache
        if cache and not follow_from(kinds, list(zip(cache.dense, cache.per_group, strict=True))):
            return False
        return follow_from(kinds, [frozenset(one.items()) for one in self._by_layer])

    def sizes(self, shape: Shape, *, layers: Sequence[int] | None = None) -> ShapeSizes:
        """Return the sizes of a shape, with the tokens that it keeps.

        ``layers``: indices of the dense model's layers that it keeps; None where they are not chosen yet: the sizes are
        then those of a removal from the middle.
        """
        keep = self._from_the_middle(shape.layers) if layers is None else tuple(layers)
        assert len(keep) == shape.layers, "the indices are those of the shape's layers"
        parameters, stored = self._outside
        if self._token is not None and shape.tokens is not None:
            removed = self._token.tokens - shape.tokens
            parameters, stored = parameters - removed * self._token.parameters, stored - removed * self._token.bytes
        active = parameters
        for kind, dense in self._sum(keep).items():
            count = self._scaled(dense, kind, shape=shape)
            parameters += count
            stored += count * kind.itemsize
            active += self._active(count, kind, shape=shape)
        return ShapeSizes(parameters, active, stored, self._cached_bytes(shape, keep))

    def _from_the_middle(self, count: int) -> tuple[int, ...]:
        removed = self.anatomy.num_layers - count
        return planned_layers(Depth(remove=removed) if removed else None, self.anatomy)

    def _sum(self, keep: tuple[int, ...]) -> Counter[_Kind]:
        """Return the dense elements of each kind in these layers."""
        if keep not in self._sums:
            total = Counter[_Kind]()
            for index in keep:
                total.update(self._by_layer[index])
            self._sums[keep] = total
        return self._sums[keep]

    def _scaled(self, dense: int, kind: _Kind, *, shape: Shape) -> int:
        """Return the elements that are left; the divisions have no remainder, because every tensor's have none."""
        anatomy, kept, of = self.anatomy, dense, 1
        if kind.field is not None:
            kept, of = kept * shape.neurons[kind.field], of * anatomy.widths[kind.field]
        if kind.by_groups and anatomy.heads and shape.kv_groups is not None:
            kept, of = kept * shape.kv_groups, of * anatomy.heads.count
        if kind.by_experts and anatomy.experts and shape.experts is not None:
            kept, of = kept * shape.experts, of * anatomy.experts.count
        return kept // of

    def _active(self, count: int, kind: _Kind, *, shape: Shape) -> int:
        top_k = self.anatomy.experts.top_k if self.anatomy.experts else None
        if not kind.routed or top_k is None or shape.experts is None:
            return count
        return count * min(top_k, shape.experts) // shape.experts

    def _cached_bytes(self, shape: Shape, keep: Sequence[int]) -> int | None:
        if self._cache is None:
            return None
        heads = self.anatomy.heads
        fewer = heads.count - shape.kv_groups if heads and shape.kv_groups is not None else 0
        return sum(self._cache.dense[index] - fewer * self._cache.per_group[index] for index in keep)


def _kind_of(anatomy: Anatomy, layer: int, *, name: str, tensor: Tensor, itemsize: int) -> _Kind:
    """Return the kind of a layer's parameter. ``name``: within the layer."""
    attention, block, experts = anatomy.attention[layer], anatomy.blocks[layer], anatomy.experts
    fields = [unit.field for unit in anatomy.units[layer] if name in _names(unit.tensors)]
    by_experts = block is not None and name in _names(block.tensors)
    stacked = experts is not None and tensor.shape[0] == experts.count
    return _Kind(
        field=next(iter(fields), None),
        by_groups=attention is not None and name in _names(attention.tensors),
        by_experts=by_experts,
        routed=by_experts or (stacked and tensor.ndim == 3),
        itemsize=itemsize,
    )


def _names(tensors: Iterable[PrunableDim]) -> set[str]:
    return {one.name for one in tensors}


def _count_cache(base: Base, *, trust_remote_code: bool) -> _Cache | None:
    """Return each layer's bytes in the cache, from the dense model and one with fewer groups; None without a count."""
    heads, config = base.anatomy.heads, base.config
    # models of their own: to count the cache moves a model's buffers to the meta device
    dense = _bytes_by_layer(build_meta_model(config, base.dense.dtype, trust_remote_code=trust_remote_code))
    if dense is None or heads is None or heads.refusal or not heads.possible:
        return _Cache(dense, (0,) * len(dense)) if dense else None
    groups = next((one for one in heads.possible if heads.count % one == 0), heads.possible[0])
    fewer = rebuild(config, heads.fields(groups), trust_remote_code=trust_remote_code)
    few = _bytes_by_layer(fewer.to(base.dense.dtype)) if fewer is not None else None
    if few is None:
        return None
    per_group = tuple((more - less) // (heads.count - groups) for more, less in zip(dense, few, strict=True))
    return _Cache(dense, per_group)


def _bytes_by_layer(model: PreTrainedModel) -> tuple[int, ...] | None:
    found = cache_bytes_by_layer(model)
    return found if found is not None and len(found) == len(find_layers(model)[1]) else None
