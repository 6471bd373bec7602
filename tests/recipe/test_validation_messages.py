"""Messages for sections that differ in their keys by ``kind``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from llmprune.common.schema import Section
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import describe_problems


def test_criteria_with_different_keys() -> None:
    """A wrong kind is answered with all kinds and the nearest one, a wrong key with the keys of its kind."""

    class Plain(Section):
        kind: Literal["plain"] = "plain"

    class Damped(Section):
        kind: Literal["damped"] = "damped"
        damping: float = 1.0

    class Holder(Section):
        criterion: Annotated[Plain | Damped, Field(discriminator="kind")]

    def message(**criterion: Any) -> str:
        with pytest.raises(ValidationError) as caught:
            Holder.model_validate({"criterion": criterion})
        return describe_problems(caught.value, Holder, data={"criterion": criterion})[0]

    assert message(kind="dampd") == "criterion.kind: must be 'plain', 'damped', not 'dampd'; did you mean 'damped'?"
    assert message(kind="sharp") == "criterion.kind: must be 'plain', 'damped', not 'sharp'"
    assert message(kind="damped", dampin=1) == "criterion.dampin: unknown key; did you mean 'damping'?"
    assert message(kind="plain", dampin=1) == "criterion.dampin: unknown key; valid keys: kind"
    assert message() == "criterion: must be a mapping with 'kind', not {}"


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ({"kind": "divergence", "tokens": 0}, "tokens: must be above 1, not 0 (Tokens of each of"),
        ({"kind": "angular", "tokens": 5}, "tokens: must be 'last' or 'all', not 5"),
        ({"kind": "block_influence", "tokens": 5}, "tokens: unknown key of this kind; it is one of divergence and"),
        ({"kind": "nope"}, "kind: must be 'divergence' or 'block_influence' or "),
    ],
)
def test_the_problems_are_those_of_the_named_kind(criterion: dict[str, Any], expected: str) -> None:
    """What other kinds would say about the section is left out."""
    data = {"model": {"id": "base"}, "depth": {"remove": 1, "criterion": criterion}}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(data)
    [problem] = describe_problems(caught.value, Recipe, data=data)
    assert problem.startswith(f"depth.criterion.{expected}")


def test_one_limit_of_two_types_is_said_once() -> None:
    """Heads are a number or a fraction; both are above zero."""
    data = {"model": {"id": "base"}, "width": {"heads": 0}}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(data)
    assert describe_problems(caught.value, Recipe, data=data)[0].startswith("width.heads: must be above 0, not 0 (")
