"""``sparsity:`` of a recipe, and which matrices of a layer it means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from llmprune.common.schema import Section
from llmprune.sparsity.method import SparsityMethod
from llmprune.sparsity.methods.alps import Alps
from llmprune.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from llmprune.anatomy.projections import Projection


def _pattern(value: str | float) -> str | float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError('give N:M, such as "2:4", or a share of weights to remove, such as 0.5')
    Pattern.parse(value)
    return value


class Sparsity(Section):
    """Which weights of the matrices that stay are made zero."""

    pattern: Annotated[str | float, BeforeValidator(_pattern)] = Field(
        description='N:M, such as "2:4": N of every M neighbouring inputs stay; or the share of each output\'s weights '
        "that goes, such as 0.5."
    )
    method: SparsityMethod = Field(Alps(), description="How the weights that stay are chosen.")
    targets: tuple[str, ...] = Field(
        (),
        strict=False,
        max_length=100,
        description="Matrices of a layer, by name or pattern, such as [q_proj, mlp.*]; left out: all of its "
        "projections.",
    )
    skip: tuple[str, ...] = Field(
        (), strict=False, max_length=100, description="Matrices that stay as they are, named likewise."
    )
    rounds: int = Field(
        1, gt=0, le=20, description="Prune in so many rounds, each further and from the weights of the one before."
    )

    @model_validator(mode="after")
    def _some_rounds(self) -> Self:
        pattern = self.parsed
        if pattern.of is not None and self.rounds > pattern.of - pattern.kept:
            raise ValueError(
                f"rounds: {pattern} takes {pattern.of - pattern.kept} of every {pattern.of} weights, one by one at "
                f"the slowest; give at most {pattern.of - pattern.kept} rounds, or a share of weights for more"
            )
        return self

    @property
    def parsed(self) -> Pattern:
        """The pattern as a value."""
        return Pattern.parse(self.pattern)

    def steps(self) -> list[Pattern]:
        """The pattern of each round: what goes in a round shrinks as the cube of what is left of them, as gradual
        pruning does (Zhu and Gupta, arXiv 1710.01878), or is one weight of a group at least.
        """
        parts = [1 - (1 - done / self.rounds) ** 3 for done in range(1, self.rounds + 1)]
        if self.parsed.of is not None:
            gone, rounds = self.parsed.of - self.parsed.kept, self.rounds
            parts = [
                min(max(round(part * gone), done), gone - (rounds - done)) / gone
                for done, part in enumerate(parts, start=1)
            ]
        return [self.parsed.towards(part) for part in parts]

    def names(self, projection: Projection) -> bool:
        """Whether the recipe means this projection."""
        return (not self.targets or _matches(projection.name, self.targets)) and not _matches(
            projection.name, self.skip
        )

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The entries of ``targets`` and ``skip`` that none of these names matches."""
        known = list(names)
        return [one for one in (*self.targets, *self.skip) if not any(_matches(name, [one]) for name in known)]


@dataclass(frozen=True)
class Selection:
    """Of one layer: projections that get the pattern, and why others that the recipe means do not."""

    chosen: tuple[Projection, ...]
    skipped: dict[str, str]


def select(projections: Iterable[Projection], sparsity: Sparsity, *, experts: int | None) -> Selection:
    """Choose by the recipe, by what hardware takes, and without routers (a score for each expert)."""
    chosen, skipped = [], {}
    for projection in projections:
        if not sparsity.names(projection):
            continue
        refusal = sparsity.parsed.refusal(projection.outputs, projection.inputs)
        if projection.outputs in (1, experts):
            refusal = "it writes a score for each expert"
        if refusal is None:
            chosen.append(projection)
        else:
            skipped[projection.name] = refusal
    return Selection(tuple(chosen), skipped)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, one) or fnmatchcase(name.rpartition(".")[2], one) for one in patterns)
