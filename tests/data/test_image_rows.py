"""Rows with images: only bytes in the row, or files in the folder of a local data set; errors name the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.image_models import image_data, llava, picture

from llmprune.checkpoint.loading import load_config, load_processor
from llmprune.common.errors import CalibrationError, ModelError, RecipeError
from llmprune.data.image_processor import ImageProcessor
from llmprune.data.image_rows import images_of
from llmprune.data.image_windows import pack_images
from llmprune.data.packing import Packing
from llmprune.data.sources import read_documents, read_rows
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import TextSource
from llmprune.testing import tiny_config


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    """The processor of a Llava; an image has four tokens."""
    source = ModelSource(id=str(llava(tmp_path_factory.mktemp("llava") / "model")))
    return load_processor(source, load_config(source))


def lines(folder: Path, rows: list[dict[str, Any]]) -> TextSource:
    """Write rows as JSON lines beside a picture; return the source."""
    picture(1).save(folder / "one.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(dataset=str(folder / "rows.jsonl"), images_field="image")


def test_a_local_file_names_pictures_beside_it(tmp_path: Path) -> None:
    """Names that lead out of its folder, by dots, by a link or absolute, and addresses are refused."""
    (tmp_path / "data").mkdir()
    picture(2).save(tmp_path / "outside.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    source = lines(
        tmp_path / "data", [{"text": "a", "image": "one.png"}, {"text": "b", "image": ["one.png", "one.png"]}]
    )
    counts = [len(images_of(row, source)) for row in read_rows(source, seed=0)]
    assert sorted(counts) == [1, 2]
    for name in ("../outside.png", "link.png", str(tmp_path / "outside.png"), "http://127.0.0.1/x.png", "absent.png"):
        with pytest.raises(CalibrationError, match="no file in its folder; give paths relative to it"):
            images_of({"image": name}, source)


def test_a_row_opens_no_file_that_it_names(tmp_path: Path) -> None:
    """The path of a row without bytes is not followed; text is read without decoding any picture."""
    picture(3).save(tmp_path / "secret.png")
    source = TextSource(dataset=str(image_data(tmp_path, 3)), images_field="image")
    with pytest.raises(CalibrationError, match=r"no image that can be read: it holds an image or a list"):
        images_of({"image": {"bytes": None, "path": str(tmp_path / "secret.png")}}, source)
    row = next(read_rows(source, seed=0))
    assert isinstance(row["image"]["bytes"], bytes)
    text = source.model_copy(update={"images_field": None})
    assert set(next(read_rows(text, seed=0))) == {"text"}
    assert next(read_documents(text, None, seed=0)).startswith("picture")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "picture": 1}, "has no column 'image'; set images_field to one of: text, picture"),
        ({"text": "a", "image": {"bytes": b"no picture", "path": None}}, "cannot be decoded (UnidentifiedImageError"),
        ({"text": "a", "image": 7}, "has no image that can be read"),
    ],
)
def test_a_column_without_images_is_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The error names the key of the recipe or the reason."""
    source = lines(tmp_path, [{"text": "a", "image": "one.png"}])
    with pytest.raises(CalibrationError) as refused:
        images_of(row, source)
    assert said in str(refused.value)


def test_texts_place_images_or_follow_them(processor: ImageProcessor, tmp_path: Path) -> None:
    """A text without a marker follows its images; one with too few or too many markers is refused."""
    source = lines(tmp_path, [])
    plain = processor.document({"text": "ab"}, [picture(1), picture(2)], source=source)
    assert plain is not None
    assert plain.tokens[:8] == [-1] * 4 + [-2] * 4
    placed = processor.document({"text": f"a{processor.marker}b"}, [picture(1)], source=source)
    assert placed is not None
    assert placed.tokens[1:5] == [-1] * 4
    for images in ([], [picture(1), picture(2)]):
        with pytest.raises(
            CalibrationError, match=r"put '<image>' into the text once for each image, or leave it out|refuses"
        ):
            processor.document({"text": f"a{processor.marker}b"}, images, source=source)


def test_a_window_is_filled_with_text_where_no_image_fits(processor: ImageProcessor, tmp_path: Path) -> None:
    """An image is never cut; images that no window holds, and too few rows, are refused with the numbers."""
    source = lines(tmp_path, [{"text": "x" * 20, "image": "one.png"}] * 6)
    windows = Calibration(dataset=source.dataset, images_field="image")
    packed = pack_images(source, processor, packing=Packing(2, 26, (), [257]), windows=windows)
    references = [(row < 0).sum().item() for row in packed.packed.windows_NL]
    assert references == [4, 4]
    assert packed.packed.windows_NL.shape == (2, 26)
    with pytest.raises(CalibrationError, match="fills 3 of 9 windows of 26 tokens with 6 rows; ask for fewer samples"):
        pack_images(source, processor, packing=Packing(9, 26, (), []), windows=windows)
    with pytest.raises(
        CalibrationError, match="6 rows have images of more tokens than a window: raise sequence_length"
    ):
        pack_images(source, processor, packing=Packing(1, 3, (), []), windows=windows)


def test_recipes_that_cannot_use_images_are_refused(tmp_path: Path) -> None:
    """Each error names the key; a model without images says so."""
    text = "model: {id: m}\ncalibration: {dataset: a/b, images_field: image}\n"
    with pytest.raises(RecipeError, match="recover: trains on text, and each source of calibration has images"):
        Recipe.parse(text + "depth: {remove: 1}\nrecover: {tokens: 1M}")
    with pytest.raises(RecipeError, match="budget: judges shapes on beginnings of windows"):
        Recipe.parse(text + "budget: {parameters: 0.5}")
    with pytest.raises(RecipeError, match="images_field belongs to calibration; here only text is read"):
        Recipe.parse("model: {id: m}\nevaluation: {perplexity: {sources: [{dataset: a/b, images_field: image}]}}")
    with pytest.raises(RecipeError, match="has text only; give a data set with images"):
        Recipe.parse("model: {id: m}\ncalibration: {dataset: 'package://json/*.py', images_field: image}")
    with pytest.raises(ModelError, match=r"does not read images .*; remove images_field, or prune a model that does"):
        load_processor(ModelSource(id=str(tmp_path)), tiny_config("llama"))
