"""Observe activations and outputs of each expert of a mixture, in any model family.

Experts are stacked in one tensor, so there is no module of one expert to hook. For their activations the block is run
expert by expert (transformers' own eager implementation), and the products with the output projection are intercepted:
the other operand holds the activations of the expert's neurons. Outputs of single experts need no loop: the block is
run, in the model's own implementation, on every choice of an expert as if it were a token with that choice alone.

How many tokens an expert has depends on the routing, and so do the shapes of what is observed. The host therefore waits
for the device in every batch that is observed: once for the outputs of all experts; for their activations a few times
for each expert, inside transformers' eager implementation. Runs that observe no expert do not wait.

Shapes in names: E experts, T tokens, K experts that a token is routed to, S = T · K choices, D hidden size, F neurons
of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.common.errors import CalibrationError

_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")


@dataclass(frozen=True)
class ExpertChoice:
    """Routing of tokens to experts: hidden states [T, D], indices [T, K] and weights [T, K] of the chosen experts."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    def at(self, rows_T: Tensor) -> ExpertChoice:
        """Return the routing of some of the tokens, by their indices."""
        return ExpertChoice(*(value.index_select(0, rows_T) for value in self._values))

    def each_alone(self) -> ExpertChoice:
        """Return every choice of an expert as if it were a token with that choice alone, S tokens in all."""
        hidden_SD = self.hidden_TD.repeat_interleave(self.index_TK.shape[1], 0)
        return ExpertChoice(hidden_SD, self.index_TK.reshape(-1, 1), self.weight_TK.reshape(-1, 1))

    def run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], *, kwargs: Mapping[str, Any], replaced: ExpertChoice
    ) -> Any:
        """Run an experts module with another routing in place of this one, which its arguments contain."""
        pairs = zip(self._values, replaced._values, strict=True)
        others = {id(old): new for old, new in pairs}
        own_args = [others.get(id(value), value) for value in args]
        return forward(*own_args, **{name: others.get(id(value), value) for name, value in kwargs.items()})

    @property
    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_TD, self.index_TK, self.weight_TK


@dataclass(frozen=True)
class ExpertOutput:
    """Output of one expert: its tokens' indices [T], and its weighted output for each of them [T, D].

    ``group``: that of the tokens, where groups are told apart.
    """

    expert: int
    token_T: Tensor
    output_TD: Tensor
    group: int = 0


class _Products(TorchFunctionMode):
    """Mode that calls ``see(expert, activation_TF)`` for every product with one expert's part of a stacked weight."""

    def __init__(self, weight: Tensor, see: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.weight, self.see = weight, see
        self.expert_bytes = weight.stride(0) * weight.itemsize

    def __torch_function__(  # noqa: PLR0917 - torch calls it
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            values = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            if len(values) > 1 and self._is_part(values[1]):
                self._note(values[0], values[1])
        return func(*args, **(kwargs or {}))

    def _is_part(self, tensor: Tensor) -> bool:
        return 0 <= tensor.data_ptr() - self.weight.data_ptr() < self.weight.shape[0] * self.expert_bytes

    def _note(self, activation: Tensor, part: Tensor) -> None:
        if part.ndim == 2:
            self.see((part.data_ptr() - self.weight.data_ptr()) // self.expert_bytes, activation.flatten(0, -2))
        elif part.shape[0] == activation.shape[0] == self.weight.shape[0]:
            routed_ET = activation.any(-1)  # tokens that are not routed to an expert are zeros
            first_ET = routed_ET.byte().argsort(dim=1, descending=True, stable=True)
            for expert, count in enumerate(routed_ET.sum(1).tolist()):
                self.see(expert, activation[expert][first_ET[expert, :count]])


@contextmanager
def _expert_by_expert(module: nn.Module) -> Iterator[None]:
    """Make a module loop over its experts while the context lasts, where transformers offers that."""
    config = getattr(module, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if config is None or before is None:
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before


@contextmanager
def activations_of_experts(module: nn.Module, weight: Tensor, *, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(expert, activation_TF)`` in every run of a module that holds experts, while the context lasts.

    ``weight``: the stacked output projection [E, …].
    """
    forward = module.forward

    def observed(*args: Any, **kwargs: Any) -> Any:
        with _expert_by_expert(module), _Products(weight, see):
            return forward(*args, **kwargs)

    module.forward = observed
    try:
        yield
    finally:
        del module.forward


@contextmanager
def activations_by_group(
    module: nn.Module,
    weight: Tensor,
    *,
    see: Callable[[int, int, Tensor], None],
    tokens: Callable[[], Iterable[tuple[int, Tensor]]],
) -> Iterator[None]:
    """As ``activations_of_experts``, but run the module on each group of tokens apart.

    ``see(group, expert, activation_TF)`` is called for each expert and group. ``tokens``: each group of the current
    run, and the indices [T] of its tokens; together all tokens. Raises CalibrationError where the arguments are no
    ``ExpertChoice``, so that tokens cannot be told apart.
    """
    forward = module.forward

    def observed(*args: Any, **kwargs: Any) -> Any:
        choice = choice_in(args, kwargs)
        if choice is None:
            raise CalibrationError(
                "neurons of routed experts cannot be scored by source: this model's experts do not get the tokens one "
                "by one; set calibration.combine to pooled"
            )
        indices, outputs = [], []
        for group, token_T in tokens():
            with _expert_by_expert(module), _Products(weight, partial(see, group)):
                outputs.append(choice.run(forward, args, kwargs=kwargs, replaced=choice.at(token_T)))
            indices.append(token_T)
        output_TD = torch.cat(outputs)
        return torch.empty_like(output_TD).index_copy_(0, torch.cat(indices), output_TD)

    module.forward = observed
    try:
        yield
    finally:
        del module.forward


def choice_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExpertChoice | None:
    """Return the routing in the arguments of an experts module; None where they are of another form."""
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    chosen = [value for value in values if not value.is_floating_point()]
    floats = [value for value in values if value.is_floating_point()]
    if len(chosen) != 1 or len(floats) != 2 or chosen[0].ndim != 2:
        return None
    hidden_TD, weight_TK = floats
    if hidden_TD.ndim != 2 or len(hidden_TD) != len(chosen[0]) or weight_TK.shape != chosen[0].shape:
        return None
    return ExpertChoice(hidden_TD, chosen[0], weight_TK)


def outputs_of_experts(
    module: nn.Module,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any],
    count: int,
    of_group: tuple[Tensor, int] | None = None,
) -> Iterator[ExpertOutput]:
    """Run an experts module with every choice as a token of its own; yield the output of every expert that has tokens.

    ``args`` and ``kwargs``: of the module's call; ``count``: the number of experts. ``of_group``: the group of each
    token [T] and the number of groups, to yield the outputs of each group's tokens apart.
    """
    choice = choice_in(args, kwargs)
    assert choice is not None, "discovery has seen the routing"
    top_k = choice.index_TK.shape[1]
    forward = partial(type(module).forward, module)
    output_SD = choice.run(forward, args, kwargs=kwargs, replaced=choice.each_alone())
    index_S, groups = choice.index_TK.flatten(), 1
    if of_group:
        groups_T, groups = of_group
        index_S = index_S + groups_T.to(index_S).repeat_interleave(top_k) * count
    expert_S, choice_S = index_S.sort(stable=True)
    each_E = torch.arange(groups * count, dtype=expert_S.dtype, device=expert_S.device)
    ends = torch.searchsorted(expert_S, each_E, right=True).tolist()
    for number, (start, end) in enumerate(pairwise([0, *ends])):
        if start < end:
            group, expert = divmod(number, count)
            yield ExpertOutput(expert, choice_S[start:end] // top_k, output_SD[choice_S[start:end]], group)
