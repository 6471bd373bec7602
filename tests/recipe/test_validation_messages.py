"""Messages for sections that differ in their keys by ``kind``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from llmprune.common.schema import Section
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
