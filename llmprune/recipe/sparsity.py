"""The recipe's ``sparsity`` section, and the matrices of a layer that it selects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Generic, Protocol, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from llmprune.common.schema import Section
from llmprune.sparsity.importance import importance_operations
from llmprune.sparsity.input_order import best_order, order_comparisons
from llmprune.sparsity.method import InputMoments, SparsityMethod
from llmprune.sparsity.methods.alps import Alps
from llmprune.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

_OPERATIONS_OF_PAIR = 50  # of products, in the time in which two scores are compared and added up


def _pattern(value: str | float) -> str | float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError('give N:M, such as "2:4", or a share of weights to remove, such as 0.5')
    Pattern.parse(value)
    return value


class Matrix(Protocol):
    """Name and size of a projection, or of each matrix of a stack."""

    @property
    def name(self) -> str:
        """Name in the layer."""

    @property
    def outputs(self) -> int:
        """Number of outputs."""

    @property
    def inputs(self) -> int:
        """Number of inputs."""


One = TypeVar("One", bound=Matrix)


class Sparsity(Section):
    """Pattern of zeros in the weight matrices of the layers that stay."""

    pattern: Annotated[str | float, BeforeValidator(_pattern)] = Field(
        description='N:M, such as "2:4": N of every M neighbouring inputs stay; or the share of each output\'s weights '
        "that is removed, such as 0.5."
    )
    method: SparsityMethod = Field(Alps(), description="How the weights that stay are chosen.")
    targets: tuple[str, ...] = Field(
        (),
        strict=False,
        max_length=100,
        description="Matrices of a layer, by name or pattern, such as [q_proj, mlp.*]; left out: all projections.",
    )
    skip: tuple[str, ...] = Field(
        (), strict=False, max_length=100, description="Matrices that stay dense, by name or pattern."
    )
    rounds: int = Field(
        1, gt=0, le=20, description="Number of rounds in which the sparsity grows, each from the weights of the last."
    )

    permute: bool | None = Field(
        None,
        description="Choose the order of MLP neurons and of value channels within a head for the pattern, where it is "
        "free; default: yes where the pattern has groups.",
    )

    @model_validator(mode="after")
    def _order_with_groups(self) -> Self:
        if self.permute and self.parsed.of is None:
            raise ValueError(
                f"permute: the order of inputs means nothing to a share of each output's weights ({self.parsed}); "
                'leave permute out, or give a pattern N:M, such as "2:4"'
            )
        return self

    @model_validator(mode="after")
    def _some_rounds(self) -> Self:
        pattern = self.parsed
        if pattern.of is not None and self.rounds > pattern.of - pattern.kept:
            raise ValueError(
                f"rounds: {pattern} removes {pattern.of - pattern.kept} of every {pattern.of} weights, at least one a "
                f"round; give at most {pattern.of - pattern.kept} rounds, or a share of weights for more"
            )
        return self

    @property
    def parsed(self) -> Pattern:
        """The pattern as a value."""
        return Pattern.parse(self.pattern)

    @property
    def permutes(self) -> bool:
        """True where the order of inputs is chosen for the pattern."""
        return self.parsed.of is not None and self.permute is not False

    def best_order(self, scores_RI: Tensor) -> Tensor:
        """Return an order of inputs in which the pattern retains more of the scores, int64 [I] on the CPU."""
        return best_order(scores_RI, pattern=self.parsed)

    def order_operations(self, outputs: int, inputs: int, *, refit: bool) -> float:
        """Return the float32 operations of ordering a matrix's inputs; ``refit``: True where the recipe refits."""
        inverses = importance_operations(inputs) if self.required_moments(refit) == "gram" else 0.0
        return inverses + _OPERATIONS_OF_PAIR * order_comparisons(outputs, inputs, pattern=self.parsed)

    def steps(self) -> list[Pattern]:
        """Return the pattern of each round, by the cubic schedule of gradual pruning (Zhu and Gupta, arXiv 1710.01878).

        The weights that are still to be removed shrink with the cube of the rounds that are left. Of N:M patterns each
        round removes at least one weight of a group.
        """
        parts = [1 - (1 - done / self.rounds) ** 3 for done in range(1, self.rounds + 1)]
        if self.parsed.of is not None:
            removed, rounds = self.parsed.of - self.parsed.kept, self.rounds
            parts = [
                min(max(round(part * removed), done), removed - (rounds - done)) / removed
                for done, part in enumerate(parts, start=1)
            ]
        return [self.parsed.towards(part) for part in parts]

    def required_moments(self, refit: bool) -> InputMoments:
        """Return the moments of the inputs that pass 2 sums; ``refit``: True where the recipe refits."""
        return self.method.required_moments(refit and self.method.refits)

    def names(self, projection: Matrix) -> bool:
        """Check that ``targets`` and ``skip`` select this projection."""
        return (not self.targets or _matches(projection.name, self.targets)) and not _matches(
            projection.name, self.skip
        )

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the entries of ``targets`` and ``skip`` that match none of these names."""
        known = list(names)
        return [one for one in (*self.targets, *self.skip) if not any(_matches(name, [one]) for name in known)]


@dataclass(frozen=True)
class Selection(Generic[One]):
    """Projections of one layer that get the pattern; ``skipped``: others that the recipe selects, with the reason."""

    chosen: tuple[One, ...]
    skipped: dict[str, str]


def select(projections: Iterable[One], sparsity: Sparsity, *, experts: int | None) -> Selection[One]:
    """Choose the projections that the recipe selects and that the pattern fits. Routers stay dense.

    ``experts``: outputs of a router; None for a layer without one.
    """
    chosen, skipped = [], {}
    for projection in projections:
        if not sparsity.names(projection):
            continue
        refusal = sparsity.parsed.refusal(projection.outputs, projection.inputs)
        if projection.outputs in (1, experts):
            refusal = "it is a router"
        if refusal is None:
            chosen.append(projection)
        else:
            skipped[projection.name] = refusal
    return Selection(tuple(chosen), skipped)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, one) or fnmatchcase(name.rpartition(".")[2], one) for one in patterns)
