"""Push of a finished run to the hub: gate, model card, provenance, files.

``llmprune run`` pushes if the recipe has a ``hub`` section; ``llmprune push`` pushes a finished run.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llmprune.anatomy.meta_model import auto_class
from llmprune.checkpoint.copied_files import is_tokenizer
from llmprune.checkpoint.loading import load_config
from llmprune.checkpoint.location import folder_of
from llmprune.common.errors import CheckpointError, HubError, LLMPruneError, OutputError, RecipeError
from llmprune.common.files import write_text
from llmprune.common.hub.explanations import endpoint
from llmprune.common.versions import now
from llmprune.cut.decision import Cut
from llmprune.publish.card import Base, CardFacts, Loading, read_metadata, write_card
from llmprune.publish.generated_windows import published_windows, write_generated
from llmprune.publish.plots import draw
from llmprune.publish.provenance import FILE, Record, describe_cut, portable_figures
from llmprune.publish.public_names import public_name
from llmprune.publish.published import Published
from llmprune.publish.quantized_result import publish_quantized, quantized_settings
from llmprune.publish.upload import additions, upload
from llmprune.recipe.evaluation import Evaluation, limit_override, recorded_tasks
from llmprune.recipe.hub import Hub
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe, validate_arguments
from llmprune.results.formatting import count, percent, ranges
from llmprune.results.load_report import load_report
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.fingerprints import file_fingerprint, fingerprint
from llmprune.results.run_folder.folder import RunFolder
from llmprune.results.run_folder.products import RECOVERY, ROUNDS, VOCABULARY
from llmprune.results.sentences.evaluation import describe_missed_bars

MORE_SAMPLES = "evaluation of more samples"  # name of the step in a report
_MODEL = ("pruning.json", RECOVERY, VOCABULARY)  # facts about the model, written with it

logger = logging.getLogger(__name__)


def publish_once(folder: RunFolder, recipe: Recipe, *, hub: Hub, report: Report) -> Published:
    """Push, unless this folder's model was already pushed with the same settings. Raises HubError."""

    def make(path: Path) -> Published:
        published = publish_run(folder, recipe, hub=hub, report=report)
        folder.write(path.name, published.model_dump_json(indent=1) + "\n")
        return published

    def load(path: Path) -> Published:
        return Published.model_validate_json(path.read_text(encoding="utf-8"))

    made = file_fingerprint(*(folder.path / name for name in (*_MODEL, "evaluation.json")))
    origin = fingerprint(made, recipe.text, recipe.overrides, hub.model_dump_json(), endpoint())
    return folder.produce("published", origin, file="published.json", load=load, make=make)


def push_run(path: Path, settings: Mapping[str, object]) -> Published:
    """Push a finished run folder; ``settings`` override those of its recipe's hub section.

    Raises OutputError if it is not a finished run, HubError if it cannot or must not be pushed.
    """
    folder = RunFolder.open_finished(path)
    try:
        report = load_report(path)
        recipe = Recipe.parse(report.recipe_text, report.overrides, source=str(path / "recipe.yaml"))
        given = {name: value for name, value in settings.items() if value is not None}
        if recipe.hub is None and "repo_id" not in given:
            raise RecipeError(f"the recipe of {path} names no repository to push to; give --repo-id, such as org/name")
        hub = validate_arguments(Hub, (recipe.hub.model_dump() if recipe.hub else {}) | given)
        return publish_run(folder, recipe, hub=hub, report=report)
    finally:
        folder.close()


def publish_run(folder: RunFolder, recipe: Recipe, *, hub: Hub, report: Report) -> Published:
    """Check, describe and upload the model of a run. Raises HubError, and CheckpointError for damaged weights."""
    refused = refusal(report)
    if refused and hub.when != "always":
        raise HubError(
            f"nothing was pushed to {hub.repo_id}: {refused}; prune less, or set when: always (--when always), "
            "and the model card will state it"
        )
    model, card = folder.path / "model", folder.path / "card"
    require_whole(model, report.pruned.parameters)
    second = quantized_settings(hub, folder.path, report=report)
    plots = draw(report, card / "plots")
    base = Base(report.provenance.model, report.provenance.commit, _base_metadata(recipe.model))
    facts = CardFacts(base, _loading(model, report), refused)
    name = None if second is None else second.repo_id
    text = write_card(hub.repo_id, report, facts=facts, plots=list(plots), quantized_repo_id=name)
    write_text(card / "README.md", text)
    files = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if name not in ("README.md", FILE)}
    files |= {f"plots/{path.name}": path for path in plots.values()}
    files |= {Path(one.file).name: folder.path / one.file for one in report.gguf}
    for name, windows in published_windows(report).items():
        write_generated(folder.path / windows, card / name)
        files[name] = card / name
    operations = additions(files)
    record = Record(
        created=now(),
        recipe=report.recipe_text,
        overrides=report.overrides,
        cut=_cut_of(folder, rounds=len(report.rounds)),
        fingerprints=folder.fingerprints(),
        files={operation.path_in_repo: operation.upload_info.sha256.hex() for operation in operations},
        refused=refused,
        report=portable_figures(report),
    )
    write_text(card / FILE, record.to_json())
    operations += additions({name: card / name for name in ("README.md", FILE)})
    published = upload(hub, operations, message=hub.commit_message or _message(report))
    if second is None:
        return published
    quantized = publish_quantized(second, folder.path, record=record, report=report, pruned=published, facts=facts)
    return published.model_copy(update={"quantized": quantized})


def _cut_of(folder: RunFolder, *, rounds: int) -> dict[str, Any]:
    """Return the cut of a run; of several rounds that of the last, with those before it as ``rounds``."""
    cut = describe_cut(Cut.load(folder.path / "cut.json"))
    places = [folder.home / ROUNDS / str(number) / "cut.json" for number in range(1, rounds)]
    return cut | ({"rounds": [describe_cut(Cut.load(path)) for path in places]} if places else {})


def require_whole(model: Path, parameters: int) -> None:
    """Raise CheckpointError if a folder's weights cannot be read, or are fewer than were verified.

    They may be more, because some models save buffers besides their parameters.
    """
    found = 0
    try:
        for path in sorted(model.glob("*.safetensors")):
            with safe_open(path, framework="pt") as weights:
                found += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{model} has weights that cannot be read ({error}); run the recipe again") from error
    if found < parameters:
        raise CheckpointError(
            f"{model} holds {found:,} parameters and {parameters:,} were verified; run the recipe again"
        )


def refuse_fewer_samples(path: Path, evaluation: Evaluation) -> None:
    """Raise OutputError if ``llmprune reevaluate`` evaluated this model on more samples of a task than these settings.

    Tasks that the settings do not name are not compared.
    """
    written = path / "report.json"
    if not written.is_file() or written.stat().st_mtime < _made_at(path):
        return
    try:
        report = load_report(path)
    except OutputError as error:
        raise OutputError(
            f"{written} is damaged or of another version of llmprune, so the samples it is based on are not known; "
            "delete it, and this run writes it anew, or give another --output"
        ) from error
    if not any(step.name == MORE_SAMPLES for step in report.steps):
        return
    earlier = recorded_tasks(report.recipe["evaluation"])
    had, wanted = earlier.limits, {name: limit for name, limit in evaluation.limits.items() if limit is not None}
    fewer = [name for name, limit in wanted.items() if name in had and (had[name] or math.inf) > limit]
    if fewer:
        raise OutputError(
            f"the report in {path} is based on {had[fewer[0]] or 'all'} samples of {fewer[0]} (llmprune reevaluate), "
            f"and this run would replace it by one on {wanted[fewer[0]]}; add --set "
            f"{shlex.quote(limit_override(earlier.limit))}, or give another --output"
        )


def _made_at(path: Path) -> float:
    """Return the time at which a run's model was written, in seconds since 1970."""
    return max((path / name).stat().st_mtime for name in _MODEL if (path / name).is_file())


def refusal(report: Report) -> str | None:
    """Return why the gate forbids publishing the model; None if it was passed or not set."""
    if report.gate is None or report.gate.passed:
        return None
    return f"the gate was not passed: {describe_missed_bars(report.gate)}"


def _base_metadata(source: ModelSource) -> dict[str, object]:
    """Read the base model's card; empty if it is no longer available."""
    try:
        return read_metadata(folder_of(source, "tokenizer"))
    except LLMPruneError as error:
        logger.warning("the model card does not name the base model's licence and languages: %s", error)
        return {}


def _loading(model: Path, report: Report) -> Loading:
    trust = report.provenance.trust_remote_code
    config = load_config(ModelSource(id=str(model.absolute()), trust_remote_code=trust))
    tokenizer = any(map(is_tokenizer, report.base_files.carried)) or (model / "tokenizer_config.json").is_file()
    architecture = next(iter(config.architectures or ()), None)
    return Loading(auto_class(config).__name__, tokenizer, hasattr(config, "auto_map") and trust, architecture)


def _message(report: Report) -> str:
    removed = ranges(report.removed_layers)
    share = report.pruned.parameters / report.dense.parameters
    layers = f", {'layers' if len(report.removed_layers) > 1 else 'layer'} {removed} removed" if removed else ""
    sparse = f", {report.sparsity.pattern} sparse" if report.sparsity else ""
    trained = f", trained on {count(report.recovery.tokens)} tokens" if report.recovery else ""
    model = public_name(report.provenance.model, local=report.provenance.commit is None)
    return f"{model} pruned to {percent(share)} of its parameters{layers}{sparse}{trained}"
