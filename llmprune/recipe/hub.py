"""The recipe's ``hub`` section: the repository that the result is pushed to, and when."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from llmprune.common.schema import Section

AUTO = "auto"


class Hub(Section):
    """Push of the pruned model with its card and provenance, in one commit or one pull request."""

    repo_id: str = Field(description="Repository for the result, such as org/name; created where it does not exist.")
    private: bool = Field(
        True, description="Create the repository as private; a public one is pushed to only where this is false."
    )
    branch: str | None = Field(None, min_length=1, description="Branch for the commit; default: main.")
    create_pr: bool = Field(False, description="Open a pull request instead of committing.")
    when: Literal["gate_passed", "always"] = Field(
        "gate_passed",
        description="gate_passed: push unless the gate failed; always: push even then, and state it in the card.",
    )
    quantized_repo_id: str | None = Field(
        None,
        description="Repository of its own for the result in its base's format (export.requantize); auto: the name of "
        "the first with the format, such as org/name-fp8. Left out: it is not pushed.",
    )
    commit_message: str | None = Field(None, min_length=1, description="Commit message; default: a summary of the cut.")

    @field_validator("repo_id")
    @classmethod
    def _whole_id(cls, repo_id: str) -> str:
        return whole_id(repo_id)

    @field_validator("quantized_repo_id")
    @classmethod
    def _auto_or_whole_id(cls, repo_id: str | None) -> str | None:
        return repo_id if repo_id in (None, AUTO) else whole_id(repo_id)

    @model_validator(mode="after")
    def _two_repositories(self) -> Self:
        if self.quantized_repo_id is not None and self.quantized_repo_id.lower() == self.repo_id.lower():
            raise ValueError("quantized_repo_id is repo_id, and each repository holds one model; name another, or auto")
        return self

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.create_pr and self.branch not in (None, "main"):
            raise ValueError("a pull request is opened against main; leave out branch, or create_pr")
        return self


def whole_id(repo_id: str) -> str:
    """Return an id of the form ``namespace/name`` unchanged. Raises ValueError for one that the hub refuses."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error).rstrip(".")) from error
    if "/" not in repo_id:
        raise ValueError("a repository to push to is named with its owner, such as my-org/my-model")
    return repo_id
