"""A run on images: scored, repaired and verified with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.image_models import gemma3, image_data

import llmprune
from llmprune import Recipe


@pytest.mark.usefixtures("in_one_process")
def test_an_image_text_model_is_scored_and_verified_on_images(tmp_path: Path) -> None:
    """The saved model computes the same logits for the images; the report says what the model was scored on."""
    model, data = gemma3(tmp_path / "model"), image_data(tmp_path, 24)
    recipe = Recipe.parse(
        f"""
        model: {{id: {model}, device_map: cpu}}
        calibration: {{dataset: {data}, images_field: image, samples: 4, sequence_length: 128, self_generated: 0}}
        depth: {{remove: 1}}
        width: {{neurons: 32, multiple: 16}}
        evaluation: {{generation: false}}
        """
    )
    report = llmprune.run(recipe, tmp_path / "run")
    assert report.verification.largest_logit_difference == 0
    assert any("scored on text and images" in note for note in report.warnings)
    assert (tmp_path / "run/model/processor_config.json").is_file()
