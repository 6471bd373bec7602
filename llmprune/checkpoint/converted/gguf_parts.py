"""Parts of a split GGUF file, ``NAME-00001-of-00003.gguf`` and so on, as llama.cpp's gguf-split names them."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmprune.common.errors import CheckpointError

GGUF_PACKAGE = "pip install 'llmprune[gguf]'"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_HEAD = struct.Struct("<4sIQ")
_OF_SPLIT, _OF_FILE = "split.", "GGUF."  # keys of one part alone: of the split, and of the reader itself


def names_of_parts(name: str) -> list[str]:
    """Return the names of all parts of the file that a part belongs to; of a whole file its own name."""
    found = _PART.fullmatch(name)
    if found is None or int(found["count"]) == 0:
        return [name]
    return [f"{found['stem']}-{number:05}-of-{found['count']}.gguf" for number in range(1, int(found["count"]) + 1)]


def first_parts(names: Collection[str]) -> list[str]:
    """Return the GGUF files among files, sorted; of a split one the name of its first part alone, missing or not."""
    return sorted({names_of_parts(name)[0] for name in names if name.endswith(".gguf")})


def has_tensors(parts: Sequence[Path]) -> bool:
    """Check by the heads of the files that they have tensors: magic, version, number of tensors."""
    for path in parts:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or _HEAD.unpack(head)[2]:  # a file that is cut short is reported by its reader
            return True
    return False


def tensor_names(parts: Sequence[Path]) -> Iterator[str]:
    """Yield the names of the tensors of all parts."""
    for reader in _readers(parts):
        yield from (tensor.name for tensor in reader.tensors)


def join_parts(parts: Sequence[Path], target: Path) -> Path:
    """Write the parts of a split file as one. Raises CheckpointError where they do not belong together."""
    from gguf import GGUFWriter

    readers = list(_readers(parts))
    _require_all(parts, readers)
    fields, tensors = readers[0].fields, [tensor for reader in readers for tensor in reader.tensors]
    writer = GGUFWriter(target, fields["general.architecture"].contents(), endianess=readers[0].endianess)
    for name, field in fields.items():
        if name != "general.architecture" and not name.startswith((_OF_SPLIT, _OF_FILE)):
            is_list = len(field.types) > 1
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if is_list else None)
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=readers[0].endianess)
    writer.close()
    return target


def _readers(parts: Sequence[Path]) -> Iterator[Any]:
    from gguf import GGUFReader

    for path in parts:
        yield GGUFReader(path)


def _require_all(parts: Sequence[Path], readers: Sequence[Any]) -> None:
    """Raise CheckpointError where the parts state other numbers than they have: of parts, and of all tensors."""
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    for number, (path, reader) in enumerate(zip(parts, readers, strict=True)):
        stated = {key: _number(reader, f"split.{key}") for key in ("no", "count", "tensors.count")}
        has = {"no": number, "count": len(parts), "tensors.count": len(names)}
        wrong = next((key for key in has if stated[key] not in (None, has[key])), None)
        if wrong is not None:
            raise CheckpointError(
                f"{path.name} is no part of the same GGUF file as the others (its split.{wrong} is {stated[wrong]}, "
                f"not {has[wrong]}); fetch all parts again, of one model"
            )


def _number(reader: Any, key: str) -> int | None:
    field = reader.get_field(key)
    return None if field is None else int(field.contents())
