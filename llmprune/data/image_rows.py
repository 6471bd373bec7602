"""Read the images of a data set's rows: from the bytes in the rows, or from files beside a local one.

A row's value never names a file outside the folder of a local data set, nor an address.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import CalibrationError
from llmprune.common.paths import is_inside, is_plain_path
from llmprune.recipe.text_source import TextSource, is_local

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_MOST_PIXELS = 100_000_000  # of one image; a small file can hold many more
_NEEDS = "it holds an image or a list of images, each with its bytes in the row"


def with_raw_images(rows: Dataset | IterableDataset, source: TextSource) -> Dataset | IterableDataset:
    """Return rows whose images are not decoded, so that reading a row opens no file that the row names."""
    import datasets

    name = str(source.images_field)
    feature = (rows.features or {}).get(name)
    raw = datasets.Image(decode=False)
    if isinstance(feature, datasets.Image):
        return rows.cast_column(name, raw)
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if isinstance(inner, datasets.Image):
        return rows.cast_column(name, datasets.List(raw))
    return rows


def images_of(row: dict[str, Any], source: TextSource) -> list[Any]:
    """Return the images of a row as PIL images in RGB. Raises CalibrationError."""
    name = str(source.images_field)
    if name not in row:
        raise CalibrationError(
            f"{source.dataset} has no column {name!r}; set images_field to one of: {', '.join(row) or 'none'}"
        )
    value = row[name]
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return [_decoded(_bytes_of(one, source), source) for one in listed]


def _bytes_of(value: Any, source: TextSource) -> bytes:
    """Return the encoded image that a row holds, or that a row of a local file names."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and is_local(source.dataset):
        folder = Path(source.dataset).parent
        path = folder / value
        if is_plain_path(value) and path.is_file() and is_inside(path.resolve(), folder.resolve()):
            return path.read_bytes()
        raise CalibrationError(
            f"{source.dataset} names the image {value!r}, which is no file in its folder; give paths relative to it"
        )
    raise CalibrationError(
        f"column {source.images_field!r} of {source.dataset} has no image that can be read: {_NEEDS}"
    )


def _decoded(content: bytes, source: TextSource) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise CalibrationError("images need a package that is not installed: pip install 'llmprune[images]'") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise CalibrationError(
                    f"an image of {source.dataset} has {image.width:,} × {image.height:,} pixels; the limit is "
                    f"{_MOST_PIXELS:,} in all: make it smaller"
                )
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise CalibrationError(
            f"an image of {source.dataset} cannot be decoded ({type(error).__name__}: {error}); {_NEEDS}"
        ) from error
