"""The recipe's ``model`` section: the model to prune, its arithmetic, and the devices for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmprune.common.paths import is_plain_path
from llmprune.common.schema import Section, Size
from llmprune.recipe.repository_names import RepositoryName

FIRST_BASE = "first_base"  # in place of a model: the first base of one that is pruned repeatedly


def _device_key(value: Any) -> Any:
    """Return a device's number as an int: YAML gives ``0`` as an int and ``--set`` as text."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


Device = Annotated[int | str, BeforeValidator(_device_key)]


class ModelSource(Section):
    """A model on the hub, in a folder, or in a GGUF file; an adapter is merged into its base first."""

    id: RepositoryName = Field(
        description="Hub id, folder, GGUF file, or package://MODULE/FILE.gguf. A folder or repository with an adapter "
        "of peft stands for its base with the adapter merged.",
    )
    revision: str = Field("main", description="Branch, tag or commit of a hub model.")
    gguf: str | None = Field(
        None,
        description="GGUF file of the folder or repository `id`, where it has several; of a split file any part.",
    )
    base: RepositoryName | None = Field(
        None,
        description="Hub id or folder of the model that the adapter in `id` belongs to; left out: the hub id that the "
        "adapter names.",
    )
    base_revision: str = Field("main", description="Branch, tag or commit of the hub model `base`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type to compute in, and of the result; auto computes in the checkpoint's type and saves each "
        "tensor in the type that it has in its file.",
    )
    device_map: Literal["auto", "cpu", "balanced"] | dict[str, Device] = Field(
        "auto",
        description="Placement of the layers on devices, as in accelerate; a mapping has a device for each part, as "
        "{'': 0}: all on the first GPU.",
    )
    max_memory: dict[Device, Size] | None = Field(
        None, description="Maximum memory on each device, such as {0: 20GiB, cpu: 64GiB}."
    )
    pickles: bool = Field(
        False,
        description="Read pickled weights (pytorch_model*.bin) where there are no safetensors, converted once by "
        "torch's weights-only loader, which runs no code of the files.",
    )
    trust_remote_code: bool = Field(
        False, description="Run the model repository's own Python code. Only for repositories that you trust."
    )

    @field_validator("gguf")
    @classmethod
    def _names_a_file(cls, name: str | None) -> str | None:
        if name is not None and not (is_plain_path(name) and name.endswith(".gguf")):
            raise ValueError("the name of a .gguf file in the folder or repository, such as model-Q8_0.gguf")
        return name

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.base is None and "base_revision" in self.model_fields_set:
            raise ValueError("base_revision belongs to base, which is not set; add base, or remove base_revision")
        if self.gguf is not None and self.base is not None:
            raise ValueError("base belongs to an adapter and gguf to a GGUF file; keep one")
        if self.gguf is not None and self.id.endswith(".gguf"):
            raise ValueError("gguf names a file of a folder or repository, and id is a GGUF file itself; remove gguf")
        return self

    def at(self, place: str, revision: str = "main") -> Self:
        """Return the source of another model, by hub id or folder, with the loading options of this one."""
        own = {"id": place, "revision": revision, "gguf": None, "base": None, "base_revision": "main"}
        return self.model_copy(update=own)
