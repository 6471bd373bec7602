"""The recipe's ``calibration`` section, and its base class, which the text for perplexity shares."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmprune.common.schema import Section, Size
from llmprune.criteria.combine import Combine
from llmprune.recipe.mixes import DEFAULT_MIX, MixName, read_mix
from llmprune.recipe.repository_names import RepositoryName
from llmprune.recipe.text_source import TextSource, readable_split

_SAMPLES, _LENGTH = 128, 2048  # calibration windows and their tokens, where the recipe gives none
NEEDS_SEVERAL = "needs several sources of text; list them, or remove combine"
_AUTO_SHARE = 4  # windows of text for each self-generated one


class TokenWindows(Section):
    """Token windows [samples, sequence_length] from one source, from several, or from a file of ready tokens."""

    _ORIGINS: ClassVar[str] = "exactly one of dataset, sources or tokens"
    _OF_ONE_SOURCE: ClassVar[tuple[str, ...]] = ("config", "split", "revision", "text_field", "messages_field")

    dataset: RepositoryName | None = Field(None, description=TextSource.model_fields["dataset"].description)
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
            rows = source.model_dump_json(exclude={"weight", "name", "licence"})
            if rows in seen:
                raise ValueError(f"{source.dataset} is listed twice with the same rows; raise its weight instead")
            seen.add(rows)
        return sources

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = self._origins()
        if len(given) != 1:
            raise ValueError(f"needs {self._ORIGINS}; {' and '.join(given) or 'none'} given")
        if self.tokens is None and self.key is not None:
            raise ValueError("key belongs to a tokens file; remove it")
        if self.tokens is not None and self.key is None:
            raise ValueError("a tokens file needs key: the name of the tensor in it")
        if self.dataset is None:
            stray = [name for name in self._OF_ONE_SOURCE if name in self.model_fields_set]
            if stray:
                raise ValueError(f"{', '.join(stray)} belongs to dataset, not to {given[0]}")
        if self.dataset is not None:
            self.text_sources()
        if self.has_images and "images_field" not in type(self).model_fields:
            raise ValueError("images_field belongs to calibration; here only text is read, so remove it")
        return self

    @property
    def has_images(self) -> bool:
        """True where a source has images beside its text."""
        return any(source.images_field is not None for source in TokenWindows.text_sources(self))

    def _origins(self) -> list[str]:
        """Return the keys that say where the windows come from; valid with exactly one."""
        return [name for name in ("dataset", "sources", "tokens") if getattr(self, name) is not None]

    def stored_shape(self) -> tuple[int, int] | None:
        """Return (N, L) of ready tokens; None for text, and where the file cannot be read, which loading reports."""
        return _stored_shape(self.tokens, str(self.key)) if self.tokens else None

    def text_sources(self) -> tuple[TextSource, ...]:
        """Return the sources of text; empty for ready tokens."""
        if self.sources is not None:
            return self.sources
        if self.dataset is None:
            return ()
        return (TextSource(**{name: getattr(self, name) for name in ("dataset", *self._OF_ONE_SOURCE)}),)


class Calibration(TokenWindows):
    """The text that scores and refits are computed on; without dataset, sources, tokens and mix: ``mix: general``."""

    _ORIGINS: ClassVar[str] = "at most one of dataset, sources, tokens or mix"
    _OF_ONE_SOURCE: ClassVar[tuple[str, ...]] = (*TokenWindows._OF_ONE_SOURCE, "images_field")

    images_field: str | None = Field(None, description=TextSource.model_fields["images_field"].description)

    mix: MixName | None = Field(
        None,
        description="Name of a ready mix of hub data sets, listed at the end of this page; default: general, where "
        "neither dataset, sources nor tokens is given.",
    )

    source_key: str | None = Field(
        None,
        description="Name of an integer tensor [N] in the tokens file, with the number of the source of each window. "
        "Cross-validation then holds out whole sources, and combine tells them apart.",
    )

    self_generated: Annotated[int, Field(ge=0)] | Literal["auto", False] = Field(
        "auto",
        description="Number of windows that the dense model writes itself, in addition to the samples: a source of its "
        "own, sampled at temperature 1. auto: a quarter of the samples, where the devices hold the whole model; 0 or "
        "false: none.",
    )

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

    @field_validator("self_generated")
    @classmethod
    def _as_number(cls, given: int | Literal["auto"]) -> int | Literal["auto"]:
        """Return 0 for false."""
        return given if given == "auto" else int(given)

    @model_validator(mode="after")
    def _valid_sources(self) -> Self:
        if self.source_key is not None and self.tokens is None:
            raise ValueError("source_key belongs to a tokens file; remove it")
        return self

    @model_validator(mode="after")
    def _several_to_combine(self) -> Self:
        if self.source_key is None and not self.combines_several(len(self.text_sources()) or 1):
            raise ValueError(
                f"combine: {self.combine} {NEEDS_SEVERAL}"
            )  # a recipe opens no file: a plan reads its keys
        return self

    def combines_several(self, read: int) -> bool:
        """Check that there are several sources to combine, ``read`` of them being read, or nothing to combine."""
        generates = self.self_generated not in {"auto", 0}  # auto writes none where memory is short
        return self.combine == "pooled" or read + generates > 1

    def _origins(self) -> list[str]:
        given = super()._origins()
        return given if given and self.mix is None else [*given, "mix"]

    @property
    def mix_name(self) -> str | None:
        """Name of the mix that the text comes from; None where the recipe names its text or tokens."""
        return (self.mix or DEFAULT_MIX) if "mix" in self._origins() else None

    def text_sources(self) -> tuple[TextSource, ...]:
        """Return the sources of text, those of the mix included; empty for ready tokens."""
        return read_mix(self.mix_name) if self.mix_name else super().text_sources()

    def read_shape(self) -> tuple[int, int]:
        """Return (N, L) of the windows that are read: the recipe's, the tokens file's, or (128, 2048)."""
        samples, length = self.stored_shape() or (_SAMPLES, _LENGTH)
        return self.samples or samples, self.sequence_length or length

    @property
    def generated(self) -> int:
        """Number of windows that the dense model writes itself."""
        return self.read_shape()[0] // _AUTO_SHARE if self.self_generated == "auto" else self.self_generated

    def shape(self) -> tuple[int, int]:
        """Return (N, L) of all windows, read and self-generated."""
        samples, length = self.read_shape()
        return samples + self.generated, length

    def stored_sources(self) -> list[int] | None:
        """Return the source of each window of ready tokens; None without ``source_key`` or a readable tensor."""
        if self.tokens is None or self.source_key is None:
            return None
        return _stored_sources(self.tokens, self.source_key)

    def number_of_sources(self) -> int:
        """Return the number of sources that are told apart, the text that the dense model writes itself included."""
        return self.read_sources + bool(self.generated)

    @property
    def read_sources(self) -> int:
        """Number of sources of the windows that are read; 1 for ready tokens without ``source_key``."""
        stored = (self.stored_sources() or [0])[: self.read_shape()[0]]
        return len(self.text_sources()) or len(set(stored))

    @property
    def scored_sources(self) -> int:
        """Number of sources whose scores are summed apart."""
        return 1 if self.combine == "pooled" else self.number_of_sources()

    @property
    def summed_sources(self) -> int:
        """Number of sources whose sums are kept apart: where they are pooled, what was read and what was generated."""
        return 1 + bool(self.generated) if self.combine == "pooled" else self.number_of_sources()


def _stored_sources(path: str, key: str) -> list[int] | None:
    """Return an integer tensor [N] of a file as a list; None where it cannot be read, which loading reports."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            sources = file.get_tensor(key)
    except (OSError, SafetensorError, TypeError):
        return None
    if sources.ndim != 1 or not sources.size or sources.dtype.kind not in "iu":
        return None
    listed = [int(source) for source in sources]
    return listed if max(listed) < 2**63 else None


def _stored_shape(path: str, key: str) -> tuple[int, int] | None:
    """Return (N, L) of ready tokens from the file's header; None where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            windows, length = file.get_slice(key).get_shape()
    except (OSError, SafetensorError, ValueError):
        return None
    return windows, length
