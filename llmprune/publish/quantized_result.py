"""Push of the result in its base's quantized format, to a repository of its own beside that of the pruned model."""

from __future__ import annotations

import json
from pathlib import Path

from llmprune.checkpoint.location import quantization_of_source
from llmprune.checkpoint.quantized.formats import Quantization, quantization_of
from llmprune.common.errors import CheckpointError, HubError
from llmprune.common.files import disk_errors, write_text
from llmprune.publish.card import CardFacts
from llmprune.publish.preflight import check_push
from llmprune.publish.provenance import FILE, Record
from llmprune.publish.published import Published
from llmprune.publish.quantized_card import write_quantized_card
from llmprune.publish.upload import additions, upload
from llmprune.recipe.hub import AUTO, Hub, whole_id
from llmprune.recipe.recipe import Recipe
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.products import QUANTIZED_MODEL

_CARD = "card/quantized"  # in the run folder


def check_pushes(recipe: Recipe, hub: Hub) -> None:
    """Check that everything which a recipe wants pushed can be. Raises HubError."""
    check_push(hub)
    quantization = quantization_of_source(recipe.model) if hub.quantized_repo_id else None
    if quantization is not None:  # else the plan refuses export.requantize
        check_push(_settings_of(hub, quantization))


def quantized_settings(hub: Hub, folder: Path, *, report: Report) -> Hub | None:
    """Return the settings to push the quantized result of a run with; None where it is not to be pushed.

    Raises HubError where the run has none, or it cannot be pushed, and CheckpointError where it is damaged.
    """
    if hub.quantized_repo_id is None:
        return None
    if report.requantized is None:
        raise HubError(
            "the run has no quantized result to push; set export.requantize: true in its recipe and run it again, or "
            "leave out quantized_repo_id"
        )
    quantized = folder / QUANTIZED_MODEL
    found = sum(path.stat().st_size for path in quantized.glob("*.safetensors"))
    if found != report.requantized.bytes:
        raise CheckpointError(
            f"{quantized} holds {found:,} bytes of weights and {report.requantized.bytes:,} were written; run the "
            "recipe again"
        )
    settings = _settings_of(hub, _quantization(quantized))
    check_push(settings)
    return settings


def publish_quantized(
    hub: Hub, folder: Path, *, record: Record, report: Report, pruned: Published, facts: CardFacts
) -> Published:
    """Describe and upload the quantized result. ``hub``: its settings; ``pruned``: the push of the unquantized one.

    Raises HubError.
    """
    quantized, card = folder / QUANTIZED_MODEL, folder / _CARD
    quantization = _quantization(quantized)
    text = write_quantized_card(hub.repo_id, report, facts=facts, pruned=pruned, quantization=quantization)
    files = {path.relative_to(quantized).as_posix(): path for path in quantized.rglob("*") if path.is_file()}
    operations = additions({name: path for name, path in files.items() if name not in ("README.md", FILE)})
    hashes = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in operations}
    origin = f"{pruned.repo_id}@{pruned.commit}"
    with disk_errors(card):
        card.mkdir(parents=True, exist_ok=True)
    write_text(card / "README.md", text)
    write_text(card / FILE, record.model_copy(update={"files": hashes, "quantized_from": origin}).to_json())
    operations += additions({name: card / name for name in ("README.md", FILE)})
    message = hub.commit_message or f"{pruned.repo_id} quantized: {quantization.describe()}"
    try:
        return upload(hub, operations, message=message)
    except HubError as error:
        raise HubError(f"{error}; the unquantized result was pushed: {pruned.url}") from error


def _quantization(folder: Path) -> Quantization:
    found = quantization_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert found is not None, "it was written with one"
    return found


def _settings_of(hub: Hub, quantization: Quantization) -> Hub:
    """Return the settings with the repository of the quantized result in place of the pruned model's."""
    assert hub.quantized_repo_id is not None
    repo_id = hub.quantized_repo_id
    if repo_id == AUTO:
        repo_id = f"{hub.repo_id}-{quantization.short_name}"
    try:
        whole_id(repo_id)
    except ValueError as error:
        raise HubError(f"quantized_repo_id: auto gives {repo_id}, which is no name: {error}; give another") from error
    return hub.model_copy(update={"repo_id": repo_id, "quantized_repo_id": None})
