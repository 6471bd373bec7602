"""Push to the hub: one commit with the whole result."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import yaml
from helpers.commands import command
from helpers.hub.server import Hub
from helpers.pushing import FILES, NAME, push, refuse, tree
from helpers.reports import gate
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from llmprune.common.errors import HubError
from llmprune.publish import quantized_result
from llmprune.publish.provenance import FILE
from llmprune.publish.push import push_run

SETTINGS = {"quant_method": "fp8", "weight_block_size": [16, 16]}
OWN = f"{NAME}-fp8"


def with_gate(run: Path, passed: bool) -> None:
    """Write a gate into the run's report."""
    path = run / "report.json"
    report = json.loads(path.read_text())
    report["gate"] = gate(0.9 if passed else 0.99, "pass" if passed else "fail").model_dump()
    path.write_text(json.dumps(report))


def test_everything_is_one_private_commit(hub: Hub, run: Path) -> None:
    """Model, tokenizer, licence, card, plots and provenance are one commit, with the files of the run folder."""
    outcome = push(run)
    repo = hub.repo(NAME)
    assert outcome.code == 0, outcome.err
    assert repo.private
    assert len(repo.messages) == 2
    assert repo.messages[-1].startswith("base pruned to 53.3% of its parameters, layers ")
    assert outcome.out == f"pushed 11 files to {NAME}\n{hub.url}/{NAME}/commit/{repo.refs['main']}\n"
    assert tree(repo) == FILES
    for path in (run / "model").iterdir():
        assert hub.content(repo, path.name) == path.read_bytes()
    record = json.loads(hub.content(repo, "llmprune.json"))
    assert record["recipe"] == (run / "recipe.yaml").read_text()
    assert record["cut"]["keep_layers"] == json.loads((run / "cut.json").read_text())["keep_layers"]
    assert record["fingerprints"].keys() >= {"scores", "cut", "model"}


def test_large_files_are_sent_in_parts(hub: Hub, run: Path) -> None:
    """A file that the hub takes in parts is complete in the end."""
    hub.part_size = 50_000
    assert push(run).code == 0
    assert sum("/complete" in line for line in hub.lines) == 1
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert hub.content(hub.repo(NAME), "model.safetensors") == weights


def test_a_second_push_replaces_the_files_of_the_first(hub: Hub, run: Path) -> None:
    """The commit deletes outdated weights, which loaders would mix in, and keeps the user's files."""
    repo = hub.add_repo(
        NAME,
        {
            "model-00001-of-00002.safetensors": b"old",
            "model.safetensors.index.json": b"{}",
            "NOTES.md": b"mine",
            "onnx/model.safetensors.index.json": b"{}",
        },
        private=True,
    )
    assert push(run, "--commit-message", "second").code == 0
    assert tree(repo) == FILES - {".gitattributes"} | {"NOTES.md", "onnx/model.safetensors.index.json"}
    assert repo.messages == ["initial commit", "second"]
    again = [line for line in hub.lines if line.startswith("PUT")]
    assert push(run).code == 0
    assert [line for line in hub.lines if line.startswith("PUT")] == again, "what is there is not sent again"


def test_a_branch_and_a_pull_request(hub: Hub, run: Path) -> None:
    """A missing branch is created; a pull request does not change main."""
    assert push(run, "--branch", "narrow").code == 0
    repo = hub.repo(NAME)
    assert tree(repo) == {".gitattributes"}
    assert tree(repo, "narrow") == FILES
    outcome = push(run, "--create-pr")
    assert outcome.out.endswith(f"{hub.url}/{NAME}/discussions/1\n")
    assert tree(repo) == {".gitattributes"}
    assert tree(repo, "refs/pr/1") == FILES
    refuse(run, "a pull request is opened against main", options=("--create-pr", "--branch", "narrow"), code=2)
    refuse(run, "no pull request can be opened", options=("--create-pr",), name="org/none")


def test_a_public_repository_needs_public_settings(hub: Hub, run: Path) -> None:
    """A push to a public repository is refused unless the settings say --public."""
    repo = hub.add_repo(NAME, {"README.md": b""})
    refuse(run, f"{NAME} is public on {hub.url} and hub.private is true", "--public")
    assert tree(repo) == {"README.md"}
    assert push(run, "--public").code == 0
    assert push(run, "--public", name="org/new").code == 0
    assert not hub.repo("org/new").private
    hub.add_repo("org/hidden", {}, private=True)
    assert "org/hidden is private and remains private" in push(run, "--public", name="org/hidden").err


def test_a_gate_that_was_not_met_forbids_the_push(hub: Hub, run: Path) -> None:
    """Only ``--when always`` pushes the model; then model card and provenance state it."""
    with_gate(run, passed=False)
    refuse(
        run, "the gate was not passed: mean retention 94.83% (92.14–97.41%), required: at least 99.00%", "--when always"
    )
    assert hub.repos == {}
    assert push(run, "--when", "always").code == 0
    card = hub.content(hub.repo(NAME), "README.md").decode()
    assert "**This model did not meet its gate**: the gate was not passed" in card
    assert json.loads(hub.content(hub.repo(NAME), "llmprune.json"))["refused"].startswith("the gate was not passed")
    with_gate(run, passed=True)
    assert push(run).code == 0
    assert "did not meet" not in hub.content(hub.repo(NAME), "README.md").decode()


def test_only_a_whole_finished_run_is_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    """Other folders, unfinished runs and weights that were not verified are refused."""
    refuse(tmp_path, "is not the folder of a run", code=2)
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(min(tensors))
    save_file(tensors, weights, {"format": "pt"})
    refuse(run, "parameters and 35,232 were verified; run the recipe again")
    weights.write_bytes(weights.read_bytes()[:-9])
    refuse(run, "has weights that cannot be read")
    (run / "report.json").unlink()
    refuse(run, "has no report.json; the run is not finished: run it again to continue it", code=2)
    assert hub.repos == {}


def test_options_override_the_recipes_hub_section(hub: Hub, run: Path) -> None:
    """``llmprune push`` uses the recipe's hub section; options override it."""
    assert command("push", run).code == 2, "no name anywhere"
    report = json.loads((run / "report.json").read_text())
    report["recipe_text"] += "hub: {repo_id: ann/mine, commit_message: from the recipe}\n"
    (run / "report.json").write_text(json.dumps(report))
    assert command("push", run).code == 0
    assert hub.repo("ann/mine").messages[-1] == "from the recipe"
    assert command("push", run, "--repo-id", "ann/other", "--commit-message", "typed").code == 0
    assert hub.repo("ann/other").messages[-1] == "typed"


def test_push_from_python(hub: Hub, run: Path) -> None:
    """``push_run`` returns the commit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as those of the hub about a card's metadata
        published = push_run(run, {"repo_id": NAME})
    assert published.commit == hub.repo(NAME).refs["main"]
    assert published.files == 11
    HfApi().delete_repo(NAME)
    assert hub.repos == {}
    assert push_run(run, {"repo_id": NAME}).commit == hub.repo(NAME).refs["main"], "created again"


@pytest.fixture
def quantized(run: Path) -> Path:
    """Run folder that also has its result in FP8."""
    folder = run / "quantized"
    shutil.copytree(run / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    (folder / "model.safetensors").write_bytes(b"quantized weights")
    report = json.loads((run / "report.json").read_text())
    report["requantized"] = {"format": "fp8 (blocks of 16 × 16)", "weights": 7, "bytes": 17, "divergence": 0.0125}
    (run / "report.json").write_text(json.dumps(report))
    return run


def test_both_results_are_pushed_and_name_each_other(hub: Hub, quantized: Path, tmp_path: Path) -> None:
    """Each repository has its own weights, card and provenance; the second is a quantized form of the first."""
    saved = tmp_path / "published.json"
    outcome = push(quantized, "--quantized-repo-id", "auto", "--save", str(saved))
    assert outcome.code == 0, outcome.err
    first, second = hub.repo(NAME), hub.repo(OWN)
    assert f"pushed 9 files to {OWN}\n{hub.url}/{OWN}/commit/{second.refs['main']}\n" in outcome.out
    published = json.loads(saved.read_text())
    assert (published["commit"], published["quantized"]["repo_id"]) == (first.refs["main"], OWN)
    assert second.private
    assert tree(second) == {name for name in FILES if not name.startswith("plots/")}
    assert hub.content(second, "model.safetensors") == b"quantized weights"
    assert hub.content(first, "model.safetensors") == (quantized / "model/model.safetensors").read_bytes()
    assert f"That checkpoint is [{OWN}](https://huggingface.co/{OWN})." in hub.content(first, "README.md").decode()
    card = hub.content(second, "README.md").decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == (NAME, "quantized")
    assert {"pruned", "llmprune", "fp8"} == set(metadata["tags"])
    assert "model-index" not in metadata, "nothing was evaluated on these weights"
    for part in (
        f"[{NAME}](https://huggingface.co/{NAME}/tree/{first.refs['main']})", "0.0125 nats per token",
        "fp8 (blocks of 16 × 16) in 7 weight matrices", f'from_pretrained("{OWN}")', "| this repository | 17 B |",
    ):  # fmt: skip
        assert part in card
    record = json.loads(hub.content(second, FILE))
    assert record["quantized_from"] == f"{NAME}@{first.refs['main']}"
    assert "quantized_from" not in card
    shown = command("inspect", OWN)
    assert f"quantized from {NAME}@" in " ".join(shown.out.split())
    assert "have the recorded SHA-256" in shown.out
    repeated = command("run", f"hub://{OWN}", "--output", tmp_path / "again")
    assert repeated.code == 1
    assert f"llmprune run hub://{NAME}@{first.refs['main']}" in repeated.err


def test_nothing_is_pushed_where_the_second_cannot_be(hub: Hub, quantized: Path) -> None:
    """Rights, visibility and whole files of both are checked before the first upload."""
    hub.add_repo(OWN, {"README.md": b""})  # public
    refuse(quantized, f"{OWN} is public", options=("--quantized-repo-id", "auto"))
    refuse(quantized, "may not write to 'others'", options=("--quantized-repo-id", "others/x"))
    refuse(quantized, "quantized_repo_id is repo_id", options=("--quantized-repo-id", NAME.upper()), code=2)
    refuse(quantized, "named with its owner", options=("--quantized-repo-id", "fp8"), code=2)
    (quantized / "quantized/model.safetensors").write_bytes(b"short")
    refuse(quantized, "holds 5 bytes of weights", options=("--quantized-repo-id", "org/q"))
    assert set(hub.repos) == {("model", OWN)}


def test_a_run_without_a_quantized_result_says_how_to_get_one(hub: Hub, run: Path) -> None:
    """The wish is not ignored; and a recipe that does not write the result cannot ask for its push."""
    refuse(run, "set export.requantize: true", options=("--quantized-repo-id", "auto"))
    assert hub.repos == {}
    done = command("run", run / "recipe.yaml", "--set", 'hub={"repo_id": "org/a", "quantized_repo_id": "auto"}')
    assert done.code == 2
    assert "set export.requantize: true" in done.err


def test_a_second_upload_that_fails_says_what_was_pushed(
    hub: Hub, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unquantized result stays on the hub, and the message has its address."""

    def fail(*_: object, **__: object) -> None:
        raise HubError("nothing was published to org/q: the hub said no")

    monkeypatch.setattr(quantized_result, "upload", fail)
    refuse(quantized, "the hub said no; the unquantized result was pushed: ", options=("--quantized-repo-id", "org/q"))
    assert tree(hub.repo(NAME)) == FILES
