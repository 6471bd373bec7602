"""The model card: metadata that the hub accepts, and a body that says what a reader must know."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from helpers.reports import COMMIT, NAME, bare_report, card, gate, sample_layers, sample_report

from llmprune.publish.card import Base, Loading, read_metadata
from llmprune.publish.plots import draw
from llmprune.publish.public_names import public_name, public_sources
from llmprune.publish.push import _message, refusal
from llmprune.results.schema import SparsityFigures


def test_metadata_names_base_relation_tags_and_licence() -> None:
    """What the hub shows beside a model comes from the base card or from the run; nothing else is taken over."""
    found = card().data.to_dict()
    assert found.pop("model-index")
    assert found == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "finetune",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "llmprune"],
    }


def test_results_are_of_dense_and_pruned() -> None:
    """Each task has both values under its metric, and perplexity too, in figures that are read back unrounded."""
    results = card().data.eval_results
    assert results is not None
    found = {(result.dataset_type, result.metric_type, result.metric_name): result.metric_value for result in results}
    assert found["arc_easy", "acc_norm", "acc_norm, pruned"] == 0.544
    assert found["arc_easy", "acc_norm", "acc_norm, dense base model"] == 0.586
    assert found["wikitext2_test.txt", "perplexity", "perplexity, pruned"] == 21.94
    assert len(found) == 2 * (3 + 1)


def test_the_body_says_what_was_removed_and_kept() -> None:
    """Layers, widths, sizes, speed, tasks with their flips, charts, the recipe verbatim, versions, commit, tokens."""
    report = sample_report()
    text = card(report).text
    said = (
        "3 of 30 removed: 12, 20, 21.", "MLP width 1,536 → 1,152", "| parameters | 134.5 M | 106 M | 78.8% |",
        "| generated tokens/s | 18.4 | 22.9 | 124.5% |", "| arc_easy (acc_norm) | 0.586 | 0.544 | 92.8% |", "41 / 20",
        "| **mean retention** |", "](plots/importance.png)", "](plots/error.png)", report.recipe_text.rstrip(),
        "- `--set refit.ridge=0.02`", f"`{COMMIT}`", "131,072 tokens, SHA-256 `5be1c7a09d2f4e83b6c0`",
        "| transformers | 5.17.0 |", "Gate: met.", f"llmprune run hub://{NAME}", "licence (apache-2.0) applies",
    )  # fmt: skip
    assert [part for part in said if part not in text] == []


def test_how_to_load_is_three_lines() -> None:
    """The class that fits the model, its tokenizer where it has one, and remote code only where it needs it."""
    lines = card().text.split("```python\n")[1].split("```")[0].splitlines()
    assert lines == [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{NAME}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{NAME}")',
    ]
    other = card(loading=Loading("AutoModelForImageTextToText", tokenizer=False, remote_code=True)).text
    assert f'AutoModelForImageTextToText.from_pretrained("{NAME}", trust_remote_code=True)' in other
    assert "AutoTokenizer" not in other


def test_a_model_that_did_not_meet_its_gate_says_so_first() -> None:
    """The warning stands above everything else, with the figures."""
    report = sample_report(gate=gate(0.99, "fail"))
    refused = refusal(report)
    assert refused == "the gate was not passed: mean retention 94.83% (92.14–97.41%), required: at least 99.00%"
    text = card(report, refused=refused).text
    assert text.index("**This model did not meet its gate**") < text.index("How to load it")
    assert f"Gate: **not met**, {refused}" in text
    assert refusal(sample_report()) is None
    assert refusal(sample_report(gate=None)) is None


def test_what_is_not_known_is_said() -> None:
    """No evaluation, no gate, no speed, no licence, no commit: sentences, and no empty tables or invented fields."""
    written = card(bare_report(), Base("/home/ann/models/base", None, {}), plots=())
    assert {"base_model", "base_model_relation", "license", "language", "model-index"}.isdisjoint(
        written.data.to_dict()
    )
    said = ("Nothing was evaluated", "No gate was set", "speed was not measured", "names no licence", "`base`, made")
    assert [part for part in said if part not in written.text] == []
    assert "/home/ann" not in written.text
    assert "plots/" not in written.text


def test_text_of_the_user_breaks_nothing() -> None:
    """Fences in the recipe, bars in names and line ends in warnings stay inside their places."""
    report = sample_report(recipe_text="# ```\n# ---\nmodel: {id: x}\n", warnings=("a | b\nc",))
    written = card(report)
    assert "````yaml\n# ```\n" in written.text
    assert "- a \\| b c\n" in written.text


@pytest.mark.parametrize(
    ("place", "public"),
    [
        ("/home/ann/text.txt (train)", "text.txt (train)"),
        ("~/text.txt", "text.txt"),
        ("data/sub/rows.jsonl (train)", "rows.jsonl (train)"),
        ("allenai/c4 (validation)", "allenai/c4 (validation)"),
        ("package://pydoc_data.topics/topics", "package://pydoc_data.topics/topics"),
        ("/home/ann/my texts/wiki (old).txt (train)", "wiki (old).txt (train)"),
        ("/home/ann/a.txt (train), /home/bob/b c.txt (test)", "a.txt (train), b c.txt (test)"),
        ("allenai/c4 (train), ~ann/own/b.txt (train)", "allenai/c4 (train), b.txt (train)"),
        ("tokens/held out.safetensors (ids)", "held out.safetensors (ids)"),
        ("texts/wiki.jsonl (train)", "wiki.jsonl (train)"),
    ],
)
def test_folders_of_this_machine_stay_here(place: str, public: str) -> None:
    """Of a file its name is told; hub ids and packages stay as they are."""
    assert public_sources(place) == public


@pytest.mark.parametrize(
    ("place", "public"),
    [
        ("/home/ann/my models/base", "base"),
        ("/home/ann/my models/base/", "base"),
        ("'/home/ann/my models/base'", "base"),
        (r"C:\Users\ann\my models\base", "base"),
        ("C:/Users/ann/base", "base"),
        (r"\\server\ann\base", "base"),
        ("file:///home/ann/base.gguf", "base.gguf"),
        ("~ann/base", "base"),
        ("my models/base", "base"),
        ("org/base", "org/base"),
        ("gpt2", "gpt2"),
        ("https://example.com/a/b", "https://example.com/a/b"),
    ],
)
def test_of_a_path_only_the_last_part_is_told(place: str, public: str) -> None:
    """Blanks, quotes, drives, shares, homes and file addresses hide no path; what the hub knows stays."""
    assert public_name(place) == public
    assert public_name("models/base", local=True) == "base"


@pytest.mark.parametrize("text", [None, "", "no metadata", "---\n[broken\n---\n", "---\n- a list\n---\n"])
def test_a_base_card_that_cannot_be_read_gives_nothing(tmp_path: Path, text: str | None) -> None:
    """Anybody's card may be missing or broken: then nothing is inherited."""
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_metadata(tmp_path) == {}


def test_a_commit_message_and_a_card_say_what_became_of_the_model() -> None:
    """One layer is not layers, a folder stays private, and what is only sparse is not called smaller."""
    report = sample_report()
    local = report.provenance.model_copy(update={"model": "/home/ann/my models/base", "commit": None})
    one = report.model_copy(update={"provenance": local, "layers": sample_layers(removed=(12,))})
    assert _message(report) == "HuggingFaceTB/SmolLM2-135M pruned to 78.8% of its parameters, layers 12, 20, 21 removed"
    assert _message(one) == "base pruned to 78.8% of its parameters, layer 12 removed"
    counted = {"matrices": 210, "weights": 100, "zeros": 50, "groups": 25, "violations": 0, "skipped": ()}
    sparsity = SparsityFigures(pattern="2:4", method="sparsegpt", **counted)
    sparse = report.model_copy(
        update={"pruned": report.dense, "layers": sample_layers(removed=()), "sparsity": sparsity}
    )
    assert _message(sparse).endswith("pruned to 100.0% of its parameters, 2:4 sparse")
    assert "), made sparse:" in card(sparse).text
    assert "), made smaller:" in card(report).text


def test_charts_are_pictures_and_always_the_same(tmp_path: Path) -> None:
    """Each PNG is a picture of the same size, and equal figures give equal bytes."""
    drawn, again = (draw(sample_report(), tmp_path / name) for name in ("once", "again"))
    assert list(drawn) == ["importance", "error"]
    for name, path in drawn.items():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert (width, height) == (1080, 420)
        assert again[name].read_bytes() == content
    assert draw(bare_report(), tmp_path / "bare") == {}
