"""The recipe's ``hub`` section: where the result goes, and when."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from llmprune.common.schema import Section


class Hub(Section):
    """Push the pruned model with its card and provenance, in one commit or one pull request."""

    repo_id: str = Field(description="Repository that gets the result, such as org/name; made if need be.")
    private: bool = Field(
        True, description="Make the repository private; a public one is only pushed to where this is false."
    )
    branch: str | None = Field(None, min_length=1, description="Branch that gets the commit; default: main.")
    create_pr: bool = Field(False, description="Open a pull request instead of committing.")
    when: Literal["gate_passed", "always"] = Field(
        "gate_passed",
        description="gate_passed: not where the gate was not met; always: also then, and the card says so.",
    )
    commit_message: str | None = Field(None, min_length=1, description="Message of the commit; default: what was cut.")

    @field_validator("repo_id")
    @classmethod
    def _whole_id(cls, repo_id: str) -> str:
        return whole_id(repo_id)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.create_pr and self.branch not in (None, "main"):
            raise ValueError("a pull request is opened against main; leave out branch, or create_pr")
        return self


def whole_id(repo_id: str) -> str:
    """The id as it is, where it is ``namespace/name`` as the hub allows it. Raises ValueError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error).rstrip(".")) from error
    if "/" not in repo_id:
        raise ValueError("a repository to push to is named with its owner, such as my-org/my-model")
    return repo_id
