"""Map the tensors of a model to those of its files, by the conversion rules of transformers."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from llmprune.checkpoint.merged_experts import groups_to_merge, merge, only_stacks
from llmprune.checkpoint.quantized.experts import DequantizedExperts, experts_by_weight
from llmprune.checkpoint.quantized.formats import Quantization
from llmprune.checkpoint.quantized.quantizers import quantizer_of
from llmprune.checkpoint.weight_headers import DTYPES, WIDE, Headers
from llmprune.common.errors import CheckpointError

Tensors = dict[str, Tensor]
# Buffers in files of older versions, which transformers ignores for every model.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
Dtypes = Mapping[str, torch.dtype]  # of parameters and buffers of a model, by name


class FileNames:
    """Mapping from each tensor of a model to the tensors of its files, by the conversion rules of transformers.

    ``quantization``: of the files, whose weights are dequantized into the model's parameters; None where they have
    none. Raises ModelError for a quantization that its library refuses.
    """

    def __init__(self, model: PreTrainedModel, headers: Headers, *, quantization: Quantization | None = None) -> None:
        self.model, self.headers, self.quantization = model, headers, quantization
        self._own_rules = get_model_conversion_mapping(model)
        self._rules = self._own_rules
        self._serialized: Mapping[str, list[str]] = {}
        if quantization is not None:
            quantizer = quantizer_of(quantization)
            self._serialized = quantizer.serialized_names
            self._rules = quantizer.update_weight_conversions(self._own_rules, model)
        self._renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        self._own_converters, self._converters = _by_pattern(self._own_rules), _by_pattern(self._rules)
        self._all_converters = list(dict.fromkeys(self._converters.values()))
        self._own = model.state_dict()
        # sources of a rule, each with its pattern, by the first tensor that the rule makes
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self._first: dict[str, str] = {}  # for each tensor of the model, the first that its rule makes
        self._unused: list[str] = []
        for name in sorted(headers, key=dot_natural_key):
            self._add(name)
        self._quantized = self._find_quantized()

    def _find_quantized(self) -> set[str]:
        """Return the tensors that are dequantized, and give all others the model's own rules."""
        found = set()
        for target, sources in self._sources.items():
            patterns = {pattern for _, pattern in sources} - {None}
            wide = all(self.headers[name].floating is not None for name, _ in sources)
            if wide and len(sources) == 1 and patterns <= self._serialized.keys():
                self._sources[target] = [(sources[0][0], None)]
            elif patterns and self._serialized and not (wide and patterns <= self._own_converters.keys()):
                found.add(target)
        return found

    def _add(self, name: str) -> None:
        converters = self._all_converters
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, converters, prefix, self._own)
        if target not in self._own and name in self._own:
            target, pattern = rename_source_key(name, [], [], prefix, self._own)
        if target not in self._own:
            self._unused.append(name)
            return
        self._sources.setdefault(target, []).append((name, pattern))
        patterns = self._converters[pattern].target_patterns if pattern else [""]
        for other in patterns:
            made = target.replace(patterns[0], other) if pattern else target
            self._first[made] = target

    def sources(self, name: str) -> list[str]:
        """Return the tensors of the files that a tensor of the model is made from; empty for a tied tensor."""
        return [source for source, _ in self._sources.get(self._first.get(name, ""), [])]

    def has(self, name: str) -> bool:
        """Check that the files have what a tensor of the model is made from."""
        return name in self._first

    @property
    def quantized(self) -> int:
        """The number of the model's tensors that are dequantized, several that one rule makes counting once."""
        return len(self._quantized)

    @property
    def used_rules(self) -> list[Any]:
        """The rules of transformers that apply to these files, for the way back from the model's tensors.

        Those of a quantization are left out: the way back writes dequantized weights.
        """
        targets = [rule.target_patterns for rule in self._all_converters if rule.was_used()]
        return [
            rule
            for rule in self._own_rules
            if (rule.target_patterns in targets if isinstance(rule, WeightConverter) else rule.was_used())
        ]

    def missing(self) -> list[str]:
        """Return the parameters that the files lack, except tied ones and those that the model declares optional."""
        patterns = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        tied = self.model.all_tied_weights_keys
        return [
            name
            for name, _ in self.model.named_parameters()
            if name not in self._first and name not in tied and not any(one.search(name) for one in patterns)
        ]

    def unexpected(self) -> list[str]:
        """Return the tensors of the files that the model does not have, except those that transformers ignores."""
        ignored = set(self.ignored())
        return [name for name in self._unused if name not in ignored]

    def ignored(self) -> list[str]:
        """Return the tensors of the files that the model does not have, and that transformers ignores."""
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]
        patterns = [re.compile(pattern) for pattern in ignored]
        return [name for name in self._unused if any(one.search(name) for one in patterns)]

    def misshapen(self) -> list[str]:
        """Return the tensors, with both shapes, whose shape in the files is not the model's."""
        found = []
        for target, sources in self._sources.items():
            name, pattern = sources[0]
            stored, wanted = list(self.headers[name].shape), list(self._own[target].shape)
            if pattern is None and stored != wanted:
                found.append(f"{target} ({stored}, not {wanted})")
        return found

    @cached_property
    def dtypes(self) -> Dtypes:
        """The type in the files of every floating-point tensor of the model; of several sources, the widest.

        Of a dequantized tensor the type of the computation.
        """
        found: dict[str, torch.dtype] = {}
        dequantized = self.compute_dtypes(self.model.dtype) if self._quantized else {}
        for name, first in self._first.items():
            if first in self._quantized:
                found[name] = dequantized[name]
                continue
            stored = [self.headers[source].floating for source in self.sources(name)]
            known = [dtype for dtype in stored if dtype is not None]
            if known:
                found[name] = reduce(torch.promote_types, known)
        return found

    def compute_dtypes(self, dtype: torch.dtype) -> Dtypes:
        """Return the types in which transformers loads parameters and buffers for a computation in ``dtype``."""
        plan = self.model._get_dtype_plan(dtype)
        patterns = {re.compile(pattern.replace("*", ".*")): kept for pattern, kept in plan.items()}
        return {
            name: next((kept for pattern, kept in patterns.items() if pattern.search(name)), tensor.dtype)
            for name, tensor in self._own.items()
        }

    def convert(self, names: Iterable[str], tensor_of: Callable[[str], Tensor], *, dtypes: Dtypes | None) -> Tensors:
        """Return tensors of the model by name, made as transformers makes them from those of the files.

        ``tensor_of``: reads a tensor of the files. ``dtypes``: types of the results, None for those of the files.
        """
        wanted = set(names)
        made: Tensors = {}
        for first in dict.fromkeys(self._first[name] for name in sorted(wanted)):
            made |= self._convert(first, tensor_of, dtype=dtypes[first] if dtypes is not None else None)
        return {name: made[name] for name in wanted}

    def _convert(self, first: str, tensor_of: Callable[[str], Tensor], *, dtype: torch.dtype | None) -> Tensors:
        sources = self._sources[first]
        pattern = sources[0][1]
        if first in self._quantized:
            try:
                made = self._dequantize(first, tensor_of)
            except _MisfitError as error:
                raise CheckpointError(
                    f"{first} cannot be dequantized ({error}); the files are incomplete or of another version of the "
                    "format: fetch them again, or prune the original in float32, bfloat16 or float16"
                ) from error
            return {name: tensor.to(dtype or self.dtypes[name]) for name, tensor in made.items()}
        tensors = [tensor_of(name) for name, _ in sources]
        if pattern is None:
            return {first: tensors[0] if dtype is None else tensors[0].to(dtype)}
        dtype = dtype or reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
        patterns = [one for _, one in sources if one is not None]
        assert len(patterns) == len(sources), "one rule makes all parts of a tensor"
        rule = self._own_converters[pattern]
        groups = groups_to_merge(rule, zip(patterns, tensors, strict=True))
        if groups is not None:
            return {first: merge(rule, groups, dtype=dtype)}
        return self._apply(rule, first, tensors=[tensor.to(dtype) for tensor in tensors])

    def _apply(self, rule: WeightConverter, first: str, *, tensors: Iterable[Tensor]) -> Tensors:
        rule = copy.deepcopy(rule)
        for (name, pattern), tensor in zip(self._sources[first], tensors, strict=True):
            rule.add_tensor(first, name, pattern, tensor)
        made = rule.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _dequantize(self, first: str, tensor_of: Callable[[str], Tensor], *, by_expert: bool = True) -> Tensors:
        """Return dequantized tensors by name. Raises _MisfitError where the stored ones do not fit together."""
        rule = self._converters[str(self._sources[first][0][1])]
        try:
            made = self._dequantize_experts(first, tensor_of, rule=rule) if by_expert else None
            made = made or self._apply(rule, first, tensors=map(tensor_of, self.sources(first)))
        except (CheckpointError, NotImplementedError):
            raise
        except Exception as error:  # libraries raise any class for tensors that do not fit
            cause = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise _MisfitError(cause) from error
        for name, tensor in made.items():
            if tensor.dtype not in WIDE:
                raise _MisfitError(f"no scale is stored for it, in {tensor.dtype}".replace("torch.", ""))
            if tensor.shape != self._own[name].shape:
                raise _MisfitError(f"its shape would be {list(tensor.shape)}, not {list(self._own[name].shape)}")
        return made

    def _dequantize_experts(
        self, first: str, tensor_of: Callable[[str], Tensor], *, rule: WeightConverter
    ) -> Tensors | None:
        """Return a stack of experts, dequantized one at a time; None where the model's rule does more than stack."""
        own = next((one for one in self._own_converters.values() if one.target_patterns == rule.target_patterns), None)
        stored: dict[str, list[str]] = {}
        for name, pattern in self._sources[first]:
            stored.setdefault(str(pattern), []).append(name)
        alike = all(len({self.headers[name].shape for name in names}) == 1 for names in stored.values())
        experts = experts_by_weight(own, stored) if own is not None and alike else None
        if experts is None:
            return None

        def dequantize(tensors: dict[str, list[Tensor]], pattern: str) -> Tensor:
            options = {"full_layer_name": first, "model": self.model, "config": self.model.config}
            weight: Tensor = rule.operations[0].convert(tensors, **options)[pattern][0]
            return weight

        groups = [
            DequantizedExperts(partial(dequantize, pattern=pattern), names, tensor_of=tensor_of)
            for pattern, names in experts.items()
        ]
        if not only_stacks(own, [[group[0]] * len(group) for group in groups]):
            return None
        return {first: merge(own, groups, dtype=groups[0][0].dtype)}

    def not_dequantizable(self) -> list[str]:
        """Return the tensors that cannot be dequantized, each with the reason, without reading weights.

        The operations run on tensors without values, once for each combination of shapes.
        """
        found, tried = [], set()
        for first in sorted(self._quantized, key=dot_natural_key):
            sources = self._sources[first]
            stored = [self.headers[name] for name, _ in sources]
            kind = [(pattern, one.dtype, one.shape) for (_, pattern), one in zip(sources, stored, strict=True)]
            signature = (re.sub(r"\.\d+\.", ".", first), *kind)
            counts = Counter(pattern for _, pattern in sources)
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{number} {pattern}" for pattern, number in counts.items())
                found.append(f"{first} ({listed})")
            elif signature not in tried:
                try:
                    self._dequantize(first, self._without_values, by_expert=False)
                except NotImplementedError:  # the operation needs values
                    pass
                except _MisfitError as error:
                    found.append(f"{first} ({error})")
                    continue
                tried.add(signature)
        return found

    def _without_values(self, name: str) -> Tensor:
        stored = self.headers[name]
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")


class _MisfitError(Exception):
    """The tensors that are stored for a weight do not fit together."""


def _by_pattern(rules: Iterable[Any]) -> dict[str, WeightConverter]:
    return {pattern: rule for rule in rules if isinstance(rule, WeightConverter) for pattern in rule.source_patterns}
