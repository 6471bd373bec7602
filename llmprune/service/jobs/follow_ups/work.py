"""Kinds of work on a finished job, each a job of its own: what it reuses, and its settings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from llmprune.recipe.recover import Count
from llmprune.service.artifacts.parts import Part


class _Work(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    needs: ClassVar[Part | None] = "run"  # of the run folder of the job; None: nothing
    title: ClassVar[str]  # begins the name of the job


class Evaluate(_Work):
    """Evaluate further tasks or more samples. The new report keeps the earlier measurements; the model is shared."""

    title: ClassVar[str] = "Evaluation"
    kind: Literal["evaluate"] = "evaluate"
    tasks: tuple[Annotated[str, Field(min_length=1, max_length=120)], ...] = Field(
        (), max_length=50, description="Further lm-eval tasks; none: more samples of the job's tasks."
    )
    limit: int | None = Field(
        None, ge=1, le=10**9, description="Samples for each of these tasks; without tasks: for each task of the job."
    )
    include_path: str | None = Field(
        None, max_length=500, description="Folder of --allow-tasks with files of these tasks, by its name."
    )


class Bench(_Work):
    """Time the model against its base, on the devices of the new job."""

    title: ClassVar[str] = "Bench"
    kind: Literal["bench"] = "bench"
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        (1, 8), min_length=1, max_length=8, description="Prompts in a batch."
    )
    contexts: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] = Field(
        (64, 512), min_length=1, max_length=8, description="Tokens of a prompt."
    )
    new_tokens: int = Field(32, ge=2, le=4096, description="Tokens generated after each prompt.")
    repeats: int = Field(5, ge=1, le=50, description="Timed runs of each model, after a warm-up.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Arithmetic.")
    static_cache: bool = Field(False, description="Allocate the key-value cache once; on CUDA also compile decoding.")


class Size(_Work):
    """Prune to another size from the scores of the job: the base model is not scored again."""

    needs: ClassVar[Part | None] = "scores"
    title: ClassVar[str] = "Size"
    kind: Literal["size"] = "size"
    keep: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the parameters to keep, where the job has such a budget."
    )
    layers: int | None = Field(None, ge=1, le=10_000, description="Layers to remove, where the job has no budget.")
    mlp: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the MLP neurons to keep, where the job has no budget."
    )

    @model_validator(mode="after")
    def _some_size(self) -> Self:
        if self.keep is None and self.layers is None and self.mlp is None:
            raise ValueError("give keep, or layers, mlp or both")
        return self


class Recover(_Work):
    """Train the job's model on more tokens, towards its base."""

    title: ClassVar[str] = "Recovery"
    kind: Literal["recover"] = "recover"
    tokens: Count | None = Field(None, description="Tokens to train on, such as 500K or 20M.")
    hours: float | None = Field(None, gt=0, le=10_000, description="Time to train for, in place of tokens.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.tokens is None) == (self.hours is None):
            raise ValueError("give exactly one of tokens and hours")
        return self


class Sparsify(_Work):
    """Set weights of the job's model to zero in a pattern. Its cut, repair and training are kept."""

    title: ClassVar[str] = "Sparse"
    kind: Literal["sparsify"] = "sparsify"
    pattern: str = Field("2:4", pattern=r"^\d{1,2}:\d{1,2}$", description="N:M, N of M neighbouring inputs stay.")


class Repeat(_Work):
    """Run the job's recipe again from the beginning."""

    needs: ClassVar[Part | None] = None
    title: ClassVar[str] = "Again"
    kind: Literal["repeat"] = "repeat"


Work = Annotated[Evaluate | Bench | Size | Recover | Sparsify | Repeat, Field(discriminator="kind")]
KINDS: tuple[type[_Work], ...] = (Evaluate, Bench, Size, Recover, Sparsify, Repeat)
ANY_WORK: TypeAdapter[Work] = TypeAdapter(Work)
