"""The recipe's ``export`` section: the files of the result."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from llmprune.common.schema import Section, Size

# Kinds of GGUF files as llama.cpp names them: the first are the converter's own, the others its quantiser's. Those that
# need an importance matrix (IQ1 to IQ3) are left out.
CONVERTED = ("f32", "f16", "bf16", "q8_0")
_Kind = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


def _lower(value: Any) -> Any:
    """Return a kind in the spelling of recipes: file names have capitals."""
    return value.lower() if isinstance(value, str) else value


GgufKind = Annotated[_Kind, BeforeValidator(_lower)]


class Export(Section):
    """Settings of the result's files."""

    prediction_heads: Literal["keep", "drop"] = Field(
        "keep",
        description="Heads that predict further tokens (MTP): kept where their layer follows the cut and transformers "
        "still reloads the result without a complaint; drop: always left out.",
    )
    max_shard_size: Size = Field(5_000_000_000, description="Maximum size of one weights file, such as 5GB.")
    gguf: tuple[GgufKind, ...] = Field(
        (),
        strict=False,
        description="GGUF files to write besides, such as [q4_k_m, q8_0], with llama.cpp's own converter and quantiser "
        "where they are installed.",
    )

    requantize: bool = Field(
        False,
        description="Also write the result in the format that the base is quantized in (FP8, compressed-tensors, "
        "bitsandbytes), into the folder quantized.",
    )

    @field_validator("gguf")
    @classmethod
    def _once(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        twice = [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is named twice; name each kind once")
        return kinds
