"""Find which layers of a model can be removed: any, those after which each layer is at an index of its kind, or none.

A config states the kind of a layer, such as attention or a mixture of experts, in lists by layer, which a cut edits, or
derives it from the layer's index, for example every eighth layer. The first layer is removed on trial: the features in
which its successors differ from their counterparts, one index lower, are those that follow from the index.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.layer_equivalence import (
    check_layer_equivalence,
    differences,
    features,
    one_of_layers,
    same_feature,
    value_text,
)
from llmprune.anatomy.layer_kinds import group_size, kinds_of, starts_of_spans
from llmprune.anatomy.meta_model import build_meta_model, find_layers
from llmprune.anatomy.types import IndexKinds
from llmprune.common.errors import ModelError


def find_depth(model: PreTrainedModel, trust_remote_code: bool) -> tuple[tuple[IndexKinds, ...], str | None]:
    """Return the kinds that follow from a layer's index, and the reason why no layer can be removed or None."""
    _, layers = find_layers(model)
    if len(layers) < 2:
        return (), "the model has a single layer"
    removed = 1 if one_of_layers(model.config) == (0,) else 0
    keep: Sequence[int] = [index for index in range(len(layers)) if index != removed]
    try:
        pruned = _without(model, keep, trust_remote_code=trust_remote_code)
        found = _kinds_by_index(layers, find_layers(pruned)[1], keep=keep)
        if found:
            keep = _keep_without_a_group(model, found)
            pruned = _without(model, keep, trust_remote_code=trust_remote_code)
        check_layer_equivalence(model, pruned, keep=keep, changing=set())
        if not found and _last_may_be_special(model):
            keep = [index for index in range(len(layers)) if index != len(layers) - 2]
            pruned = _without(model, keep, trust_remote_code=trust_remote_code)
            check_layer_equivalence(model, pruned, keep=keep, changing=set())
    except ModelError as error:
        return (), str(error)
    except Exception as error:  # a model class may fail in any way on a config that it does not expect
        return (), f"no model can be built from the config without a layer: {type(error).__name__}: {error}"
    return found, None


def find_special_last(model: PreTrainedModel, trust_remote_code: bool) -> tuple[int, ...]:
    """Return the last layer where the one before it would become of another kind as the last; otherwise nothing."""
    if not _last_may_be_special(model):
        return ()
    count = len(find_layers(model)[1])
    keep = range(count - 1)
    try:
        pruned = _without(model, keep, trust_remote_code=trust_remote_code)
        check_layer_equivalence(model, pruned, keep=keep, changing=set())
    except ModelError:
        return (count - 1,)
    return ()


def _last_may_be_special(model: PreTrainedModel) -> bool:
    """Check whether some layer is unlike the last one, although the config lists no kinds of layers."""
    *others, last = map(features, find_layers(model)[1])
    alike = (
        last.keys() == other.keys() and all(same_feature(value, other[name]) for name, value in last.items())
        for other in others
    )
    return len(others) > 1 and not one_of_layers(model.config) and not all(alike)


def _without(model: PreTrainedModel, keep: Sequence[int], *, trust_remote_code: bool) -> PreTrainedModel:
    return build_meta_model(edit_config(model.config, keep, widths={}), trust_remote_code=trust_remote_code)


def _kinds_by_index(layers: nn.ModuleList, pruned: nn.ModuleList, *, keep: Sequence[int]) -> tuple[IndexKinds, ...]:
    """Return each partition of the layers by a feature that follows from their index, once.

    Features that follow from their index together with a list by layer, or from the number of layers, are left out.
    """
    pairs = [(layers[old], layers[new], pruned[new]) for new, old in enumerate(keep)]
    changed = dict.fromkeys(name for layer, _, moved in pairs for name, _ in differences(layer, moved, changing=set()))
    if not changed:
        return ()
    others = {name for _, there, moved in pairs for name, _ in differences(there, moved, changing=set())}
    found, seen = dict[tuple[int, ...], IndexKinds](), [features(layer) for layer in layers]
    for name in (name for name in changed if name not in others):
        partition, kinds = _partition([one.get(name) for one in seen])
        found.setdefault(partition, IndexKinds(name, kinds))
    return tuple(found.values())


def _partition(values: Sequence[object]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return for each layer the first layer with the same value, and the value as text."""
    first = [next(index for index, other in enumerate(values) if same_feature(other, value)) for value in values]
    texts = [
        f"as in layer {index}" if isinstance(values[index], Tensor) else value_text(values[index]) for index in first
    ]
    return tuple(first), tuple(texts)


def _keep_without_a_group(model: PreTrainedModel, partitions: Sequence[IndexKinds]) -> Sequence[int]:
    """Return the layers to keep where the group nearest to the middle is removed; where there is none, the last."""
    count, one_of = len(partitions[0].kinds), set(one_of_layers(model.config))
    kinds = kinds_of(partitions, count)
    size = group_size(kinds) or 1
    spans = [range(start, start + size) for start in starts_of_spans(kinds, size)]
    usable = [span for span in spans if not one_of or one_of - set(span)]
    removed = min(usable or spans, key=lambda span: abs(span.start + size // 2 - count // 2))
    return [index for index in range(count) if index not in removed]
