"""Images in windows: the layer-wise forward pass equals the model's own on the processor's inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import image_models
from helpers.image_models import image_data

from llmprune.checkpoint.loading import load_config, load_model, load_processor, load_tokenizer
from llmprune.checkpoint.open_decoder import open_decoder
from llmprune.data.windows import TextWindows, load_windows
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.model import ModelSource

FAMILIES = {  # by how their processors lay out images
    "llava": {"nested": False, "marks": {}},
    "gemma3": {"nested": False, "marks": {"token_type_ids": 1}},
    "idefics3": {"nested": True, "marks": {}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 pictures."""
    return image_data(tmp_path_factory.mktemp("pictures"), 24)


def windows_of(source: ModelSource, data: Path, **settings: object) -> TextWindows:
    """Return four windows with images."""
    calibration = Calibration.model_validate(
        {"dataset": str(data), "images_field": "image", "samples": 3, "sequence_length": 128, **settings}
    )
    return load_windows(
        calibration,
        load_tokenizer(source),
        default_shape=(1, 1),
        processor=lambda: load_processor(source, load_config(source)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_equals_the_models_own(family: str, data: Path, tmp_path: Path) -> None:
    """Logits are equal to the bit, for batches that mix windows with and without images; images matter."""
    source = ModelSource(id=str(getattr(image_models, family)(tmp_path / family)))
    text = windows_of(source, data)
    assert text.images is not None
    assert (text.images.is_nested, text.images.marks) == (FAMILIES[family]["nested"], FAMILIES[family]["marks"])
    without_NL = text.images.plain(text.windows_NL[:1]) % 100
    windows_NL = torch.cat([text.windows_NL, without_NL])
    decoder, model = open_decoder(source), load_model(source)
    decoder.images = text.images
    forward = LayerwiseForward(decoder, windows_NL, batch_size=2)
    assert torch.equal(forward.targets.of(0, torch.device("cpu")), windows_NL[:2, 1:] >= 0)
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    with torch.no_grad():
        for batch, ids_BL in enumerate(torch.split(windows_NL, 2)):
            own_BLV = model(**text.images.model_inputs(ids_BL), use_cache=False).logits
            assert torch.equal(forward.logits(batch), own_BLV)
        plain_BLV = model(input_ids=text.images.plain(windows_NL[:2]), use_cache=False).logits
    assert not torch.allclose(forward.logits(0), plain_BLV, atol=1e-2)


def test_windows_hold_whole_images_and_are_reproducible(data: Path, tmp_path: Path) -> None:
    """No image is cut in two, and the fingerprint tells other pixels apart."""
    source = ModelSource(id=str(image_models.idefics3(tmp_path / "model")))
    first, second = windows_of(source, data), windows_of(source, data)
    assert first.images is not None
    assert first.fingerprint() == second.fingerprint()
    images, counts = torch.unique(first.windows_NL[first.windows_NL < 0], return_counts=True)
    assert counts.unique().tolist() == [5]  # four tiles and the whole picture, of one token each
    assert images.tolist() == list(range(-len(first.images.images), 0))
    (tmp_path / "other").mkdir()
    others = windows_of(source, image_data(tmp_path / "other", 24, first=100))
    assert torch.equal(first.windows_NL, others.windows_NL)
    assert first.fingerprint() != others.fingerprint()
