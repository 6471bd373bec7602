"""A token and the signatures of upload links are nowhere: not printed, logged, written, pushed or raised."""

from __future__ import annotations

import io
import logging
import os
import shutil
import traceback
from pathlib import Path

import pytest
from helpers.commands import command, verify_here, write_recipe
from helpers.hub.faults import Fault
from helpers.hub.published import draw_nothing, hub_recipe, publish_model, publish_text
from helpers.hub.server import Hub
from helpers.hub.state import SIGNATURE, TOKEN
from helpers.tiny import tiny_tokenizer
from huggingface_hub import constants

from llmprune.checkpoint.loading import load_model
from llmprune.common.errors import LLMPruneError, RecipeError
from llmprune.common.hub.client import resolve_revision
from llmprune.common.hub.secrets import has_token, redact
from llmprune.data.windows import load_windows
from llmprune.publish.preflight import check_push
from llmprune.publish.provenance import fetch_record
from llmprune.publish.upload import additions, upload
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.hub import Hub as Section
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe

SECRETS = (TOKEN, SIGNATURE, SIGNATURE.partition("=")[2])


def found_in(text: str) -> list[str]:
    """The secrets that a text holds."""
    return [secret for secret in SECRETS if secret in text]


def test_a_whole_run_with_every_kind_of_trouble(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pull, prune and push while the hub is busy, out of order and cut off, at the most talkative level."""
    verify_here(monkeypatch)
    draw_nothing(monkeypatch)
    told = io.StringIO()
    for handler in logging.getLogger("huggingface_hub").handlers:
        monkeypatch.setattr(handler, "stream", told)
    publish_model(hub, tmp_path / "base", private=True)
    publish_text(hub)
    hub.faults += [
        Fault("GET /cdn/", cut=1000, times=1),
        Fault("GET /cdn/", 429, times=1),
        Fault("PUT /lfs/", 500, times=2, body=f'{{"error": "bad link {hub.storage}/lfs/1?{SIGNATURE}"}}'),
        Fault("PUT /lfs/", cut=1000, times=2),
        Fault("POST .*/commit/", 503, times=2, body=f'{{"error": "who is {TOKEN}?"}}'),
    ]
    recipe = hub_recipe(tmp_path / "recipe.yaml", hub={"repo_id": "org/pruned"})
    outcome = command("--verbose", "run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert all(fault.times == 0 for fault in hub.faults)
    assert "trying again in" in outcome.err
    assert found_in(outcome.out + outcome.err + told.getvalue()) == []
    assert f"PUT {hub.storage}/lfs/" in told.getvalue(), "the hub client tells where it tries again"
    assert "?***" in told.getvalue()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if found_in(path.read_bytes().decode("latin-1"))] == []
    for repo in hub.repos.values():
        for tree in repo.commits.values():
            for path in tree:
                ref = next(
                    ref for ref, sha in repo.refs.items() if repo.commits[sha] is tree or path in repo.commits[sha]
                )
                assert found_in(hub.content(repo, path, ref).decode("latin-1")) == []
    assert found_in("".join(hub.repo("org/pruned").messages)) == []


def test_what_is_raised_tells_no_secret(hub: Hub, tmp_path: Path) -> None:
    """Each failure on each way to the hub, with the whole chain of what it came from, as a traceback prints it."""
    publish_model(hub, tmp_path / "base")
    publish_text(hub)
    (tmp_path / "llmprune.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 999)
    section = Section(repo_id="org/pruned")
    files = {name: tmp_path / name for name in ("llmprune.json", "model.safetensors")}
    ways = {
        "pull": lambda: load_model(ModelSource(id="org/base")),
        "text": lambda: load_windows(Calibration(dataset="org/text"), tiny_tokenizer(), default_shape=(4, 16)),
        "look": lambda: check_push(section),
        "push": lambda: upload(section, additions(files), message="pushed"),
        "record": lambda: fetch_record("org/base"),
    }
    troubles = {
        "pull": ["GET /cdn/", "HEAD .*config.json", "GET /api/models/"],
        "text": ["GET /api/datasets/"],
        "look": ["GET /api/whoami", "GET /api/models/"],
        "push": ["POST /api/repos", "PUT /lfs", "POST .*/verify", "POST .*/batch", "POST .*/commit/"],
        "record": ["HEAD .*llmprune.json"],
    }
    said = 0
    for way, matches in troubles.items():
        for match in matches:
            for status in (401, 403, 500):
                resolve_revision.cache_clear()
                shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
                hub.repos.pop(("model", "org/pruned"), None)
                hub.faults[:] = [Fault(match, status, body=f'{{"error": "{TOKEN} at https://x.y/z?{SIGNATURE}"}}')]
                with pytest.raises(LLMPruneError) as caught:
                    ways[way]()
                printed = "".join(traceback.format_exception(caught.value))
                said += "***" in printed
                assert found_in(printed) == [], (way, match, status)
    assert said > 20, "there was something to hide"


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (f"# HF_TOKEN={TOKEN}\nmodel: {{id: x}}\n", [], "line 1: holds a token"),
        (
            f"model: {{id: x}}\ncalibration: {{dataset: y}}\nhub: {{repo_id: a/b, token: {TOKEN}}}\n",
            [],
            "line 3: holds",
        ),
        (f"model: [{TOKEN}\n", [], "line 1: holds"),
        ("model: {id: x}\n", [f"hub.token={TOKEN}"], "override 1 (--set): holds"),
        ("model: {id: hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345}\n", [], "line 1: holds"),
        ("model: {id: my-own-secret}\n", [], "line 1: holds"),
    ],
)
def test_a_recipe_with_a_token_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, overrides: list[str], said: str
) -> None:
    """It would travel onto the hub: the line is named, the token is not, and nothing is written."""
    monkeypatch.setenv("HF_TOKEN", "my-own-secret" if "my-own" in text else TOKEN)
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, overrides)
    assert said in str(caught.value)
    assert "remove it, and set HF_TOKEN instead" in str(caught.value)
    assert found_in(str(caught.value)) == []
    (tmp_path / "recipe.yaml").write_text(text)
    sets = [part for override in overrides for part in ("--set", override)]
    outcome = command("run", tmp_path / "recipe.yaml", *sets, "--output", tmp_path / "run")
    assert outcome.code == 2
    assert found_in(outcome.out + outcome.err) == []
    assert not (tmp_path / "run").exists()


def test_a_recipe_made_in_python_is_no_way_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What never was YAML is looked at before the run writes it."""
    from llmprune import run

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    recipe = Recipe.model_validate({"model": {"id": TOKEN}, "calibration": {"dataset": "x"}})
    with pytest.raises(RecipeError, match="holds a token"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_that_only_look_alike_are_no_tokens(tmp_path: Path) -> None:
    """An organisation's name, a commit or a word that begins with hf_ is nobody's secret."""
    for harmless in ("hf-internal-testing/tiny-random-LlamaForCausalLM", "hf_transfer", "a" * 40, "hf_home_folder"):
        assert not has_token(harmless)
    assert Recipe.load(write_recipe(tmp_path / "recipe.yaml", "hf-internal-testing/x", "y")).model.id.startswith("hf-")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://ann:secret@hub.example/a?x=1", "https://***@hub.example/a?***"),
        ("see https://s3.example/k?X-Amz-Signature=abc&e=1, then", "see https://s3.example/k?***, then"),
        ("Authorization: Bearer abcdef", "Authorization: Bearer ***"),
        (f"token {TOKEN}.", "token ***."),
        ("hf_oauth_AbCdEfGhIjKlMnOpQrStUvWxYz", "***"),
        ("is it so? https://hub.example/a", "is it so? https://hub.example/a"),
        ("{'Authorization': 'Bearer abcdef'}", "{'Authorization': 'Bearer ***'}"),
        ("sent Bearer s3cr-et.x_Y/z=; then", "sent Bearer ***; then"),
        ("authorization: bearer abcdefgh.", "authorization: bearer ***."),
        ("(see https://s3.example/k?a=b).", "(see https://s3.example/k?***)."),
    ],
)
def test_redaction(text: str, clean: str) -> None:
    """Tokens, users in addresses, and their queries go; everything else stays."""
    assert redact(text) == clean
    assert os.environ.get("HF_TOKEN", "") == "" or os.environ["HF_TOKEN"] not in clean


@pytest.mark.parametrize(
    "sentence",
    [
        "send Authorization: Bearer TOKEN; set LLMPRUNE_TOKEN or give --token-file",
        "give Authorization: Bearer HF_TOKEN, not Basic",
        "the Bearer token is not valid; set HF_TOKEN to one from the hub's settings page",
        "is llmprune serve running at http://127.0.0.1:8321? see --server",
        "nothing answers at https://hub.example/a?; check the network",
        "hub://gpt2@main has no llmprune.json; give hub://ORG/NAME@REVISION",
    ],
)
def test_redaction_leaves_remedies_whole(sentence: str) -> None:
    """Names of secrets, placeholders, punctuation and addresses without secrets are no secrets."""
    assert redact(sentence) == sentence
    assert not has_token(sentence)
