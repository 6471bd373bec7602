"""The recipe's ``model`` section: the model to prune, its arithmetic, and the devices for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmprune.common.schema import Section, Size


def _device_key(value: Any) -> Any:
    """Return a device's number as an int: YAML gives ``0`` as an int and ``--set`` as text."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


Device = Annotated[int | str, BeforeValidator(_device_key)]


class ModelSource(Section):
    """A model on the hub, in a folder, or in a GGUF file of an installed package."""

    id: str = Field(min_length=1, description="Hub id, folder, or package://MODULE/FILE.gguf.")
    revision: str = Field("main", description="Branch, tag or commit of a hub model.")
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
