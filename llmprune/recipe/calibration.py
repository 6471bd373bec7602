"""The recipe's ``calibration`` section, and its base class, which the text for perplexity shares."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmprune.common.schema import Section, Size
from llmprune.criteria.combine import Combine
from llmprune.recipe.text_source import TextSource, readable_split


class TokenWindows(Section):
    """Token windows [samples, sequence_length] from one source, from several, or from a file of ready tokens."""

    dataset: str | None = Field(None, min_length=1, description=TextSource.model_fields["dataset"].description)
    config: str | None = Field(None, description=TextSource.model_fields["config"].description)
    split: str = Field("train", description=TextSource.model_fields["split"].description)
    revision: str | None = Field(None, description=TextSource.model_fields["revision"].description)
    text_field: str | None = Field(None, description=TextSource.model_fields["text_field"].description)
    messages_field: str | None = Field(None, description=TextSource.model_fields["messages_field"].description)
    sources: tuple[TextSource, ...] | None = Field(
        None, strict=False, min_length=1, description="Several sources, mixed by weight."
    )
    tokens: str | None = Field(None, description="A safetensors file of ready token windows [N, L].")
    key: str | None = Field(None, description="Name of the tensor in the tokens file.")
    samples: int | None = Field(
        None, gt=0, description="Number of windows N; default: 128, for perplexity 32, of a tokens file all."
    )
    sequence_length: int | None = Field(
        None, ge=8, description="Tokens in a window L; default: 2048, or the tokens file's."
    )
    documents: Literal["end_of_text", "blank_line", "separate"] = Field(
        "end_of_text",
        description="Separator between the documents of a window: the end-of-text token or a blank line; or separate: "
        "each window holds one document, and documents shorter than a window are left out.",
    )
    bos: bool | Literal["auto"] = Field(
        "auto",
        description="Begin-of-text token in front of each window, and of each document after an end-of-text token; "
        "auto: where the tokenizer puts one in front of a text. Only true changes ready tokens: windows without the "
        "token get it in front and lose their last token.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the document shuffle.")
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Windows that a layer processes at a time; auto: on a GPU as many as its memory holds, up to about "
        "16,000 tokens, on the CPU 4. Where a GPU's memory is full, half as many are tried.",
    )

    @field_validator("split")
    @classmethod
    def _readable_split(cls, split: str) -> str:
        return readable_split(split)

    @field_validator("sources")
    @classmethod
    def _different(cls, sources: tuple[TextSource, ...] | None) -> tuple[TextSource, ...] | None:
        seen: set[str] = set()
        for source in sources or ():
            rows = source.model_dump_json(exclude={"weight"})
            if rows in seen:
                raise ValueError(f"{source.dataset} is listed twice with the same rows; raise its weight instead")
            seen.add(rows)
        return sources

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("dataset", "sources", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of dataset, sources or tokens; {' and '.join(given) or 'none'} given")
        if self.tokens is None and self.key is not None:
            raise ValueError("key belongs to a tokens file; remove it")
        if self.tokens is not None and self.key is None:
            raise ValueError("a tokens file needs key: the name of the tensor in it")
        if self.dataset is None:
            single = ("config", "split", "revision", "text_field", "messages_field")
            stray = [name for name in single if name in self.model_fields_set]
            if stray:
                raise ValueError(f"{', '.join(stray)} belongs to dataset, not to {given[0]}")
        if self.dataset is not None:
            self.text_sources()
        return self

    def stored_shape(self) -> tuple[int, int] | None:
        """Return (N, L) of ready tokens; None for text, and where the file cannot be read, which loading reports."""
        return _stored_shape(self.tokens, str(self.key)) if self.tokens else None

    def text_sources(self) -> tuple[TextSource, ...]:
        """Return the sources of text; empty for ready tokens."""
        if self.sources is not None:
            return self.sources
        if self.dataset is None:
            return ()
        fields = ("dataset", "config", "split", "revision", "text_field", "messages_field")
        return (TextSource(**{name: getattr(self, name) for name in fields}),)


class Calibration(TokenWindows):
    """The text that scores and refits are computed on."""

    combine: Combine = Field(
        "pooled",
        description="How the scores by several sources become one, for layers, neurons, heads and experts: pooled sums "
        "over all tokens; rank_mean takes the mean of the ranks by each source; worst the highest of them, so that "
        "what any source needs is kept.",
    )

    stream_memory: Size = Field(
        16 * 2**30,
        description="Maximum memory for the hidden states of all tokens, for dense and pruned each, and for each other "
        "tensor that is stored for all tokens; larger ones are kept in a file.",
    )

    stream_disk: Size = Field(
        16 * 2**30,
        description="Maximum disk for the dense hidden states after every layer, which pass 1 stores so that pass 2 "
        "need not compute them again; they are deleted after pass 2.",
    )

    @model_validator(mode="after")
    def _several_to_combine(self) -> Self:
        if self.combine != "pooled" and len(self.text_sources()) < 2:
            raise ValueError(f"combine: {self.combine} needs several sources of text; list them, or remove combine")
        return self

    @property
    def scored_sources(self) -> int:
        """Number of sources whose scores are summed apart."""
        return 1 if self.combine == "pooled" else len(self.text_sources())

    def shape(self) -> tuple[int, int]:
        """Return (N, L): the recipe's, else the tokens file's, else 128 windows of 2048 tokens."""
        samples, length = self.stored_shape() or (128, 2048)
        return self.samples or samples, self.sequence_length or length


def _stored_shape(path: str, key: str) -> tuple[int, int] | None:
    """Return (N, L) of ready tokens from the file's header; None where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            windows, length = file.get_slice(key).get_shape()
    except (OSError, SafetensorError, ValueError):
        return None
    return windows, length
