"""Model card: metadata that the hub accepts, and a body with everything a reader needs."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.reports import COMMIT, NAME, bare_report, card, gate, sample_layers, sample_report
from helpers.searching import searched, with_broken
from helpers.trained_reports import trained, trained_report

from llmprune.publish.card import Base, Loading, read_metadata
from llmprune.publish.plots import draw
from llmprune.publish.public_names import public_name, public_sources
from llmprune.publish.push import _message, refusal
from llmprune.results.figures.layers import SparsityFigures
from llmprune.results.figures.next_tools import Degrees, NextTools, Rows
from llmprune.results.figures.result_files import RequantizedFigures


def test_metadata_names_base_relation_tags_and_licence() -> None:
    """Metadata comes from the base model's card or from the run; nothing else is inherited."""
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
    """Tasks and perplexity have the values of both models, not rounded."""
    results = card().data.eval_results
    assert results is not None
    found = {(result.dataset_type, result.metric_type, result.metric_name): result.metric_value for result in results}
    assert found["arc_easy", "acc_norm", "acc_norm, pruned"] == 0.544
    assert found["arc_easy", "acc_norm", "acc_norm, dense base model"] == 0.586
    assert found["wikitext2_test.txt", "perplexity", "perplexity, pruned"] == 21.94
    assert len(found) == 2 * (3 + 1)


def test_a_searched_shape_says_how_it_was_found() -> None:
    """Budget, choice, margin over the single axes, and the chart are on the card; folders of the machine are not."""
    text = card(sample_report(search=with_broken(searched())), plots=("frontier",)).text
    for part in (
        "20 of 61 shapes that meet the budget were tried", "Budget: at most 100.9 M parameters.",
        "Chosen: 29 layers, 1088 neurons, 2 groups: 99.97 M parameters", "](plots/frontier.png)",
        "One step further in layers: 28 layers", "is broken on code",
    ):  # fmt: skip
        assert part in text
    private = with_broken(searched(sources=("/home/ann/code.txt", "web", "maths")), source="/home/ann/code.txt")
    own = {"code": "/home/ann/code.txt"}
    tried = tuple(
        one.model_copy(update={"divergence": {own.get(name, name): value for name, value in one.divergence.items()}})
        for one in private.tried
    )
    assert "/home/ann" not in card(sample_report(search=private.model_copy(update={"tried": tried}))).text
    assert "How the shape was found" not in card().text


def test_the_body_lists_what_was_removed_and_kept() -> None:
    """Layers, widths, sizes, speed, tasks with their flips, charts, the recipe verbatim, versions, commit, tokens."""
    report = sample_report()
    text = card(report).text
    parts = (
        "3 of 30 removed: 12, 20, 21.", "MLP width 1,536 → 1,152", "| parameters | 134.5 M | 106 M | 78.8% |",
        "| generated tokens/s | 18.4 | 22.9 | 124.5% |", "| arc_easy (acc_norm) | 0.586 | 0.544 | 92.8% |", "41 / 20",
        "| **mean retention** |", "](plots/importance.png)", "](plots/error.png)", report.recipe_text.rstrip(),
        "- `--set refit.ridge=0.02`", f"`{COMMIT}`", "131,072 tokens, SHA-256 `5be1c7a09d2f4e83b6c0`",
        "| transformers | 5.17.0 |", "Gate: met.", f"llmprune run hub://{NAME}", "licence (apache-2.0) applies",
    )  # fmt: skip
    assert [part for part in parts if part not in text] == []


def test_the_card_names_the_quantized_result() -> None:
    """Its format, size and divergence are figures of this model, whose repository does not have that checkpoint."""
    again = RequantizedFigures(format="fp8", weights=1, bytes=120_000_000, divergence=0.00123)
    text = card(sample_report(requantized=again)).text
    assert (
        "- Quantized again as its base was: fp8 in 1 weight matrix, 120 MB; KL divergence from the unquantized" in text
    )
    assert "0.00123 nats per token on calibration text. That checkpoint is not in this repository." in text
    assert "Quantized again" not in card().text


def test_the_card_says_how_to_load_it_where_that_works() -> None:
    """vLLM for every model; llama.cpp for architectures that its converter knows, in a type that all rows allow."""
    rows = {"mlp.down_proj": 1408}
    all_degrees = Degrees(allowed=(1, 2), lost=(4,))
    tools = NextTools(
        tensor_parallel=all_degrees, expert_parallel=None, vocabulary=all_degrees, groups={128: all_degrees},
        fp8_blocks=all_degrees, k_quants=Rows(broken=rows, lost=rows),
    )  # fmt: skip
    llama = Loading("AutoModelForCausalLM", tokenizer=True, remote_code=False, architecture="LlamaForCausalLM")
    text = card(sample_report(next_tools=tools), loading=llama).text
    for part in (
        f"vllm serve {NAME}\n", "llama-quantize model.gguf model-Q8_0.gguf Q8_0", "on 1 or 2 GPUs (lost: 4)",
        "k-quants of llama.cpp for all matrices but mlp.down_proj (1,408 in a row, lost)",
    ):  # fmt: skip
        assert part in text
    assert "model-Q4_K_M.gguf" in card(loading=llama).text
    other = card(sample_report(next_tools=tools), loading=replace(llama, architecture="ZambaForCausalLM")).text
    assert "llama.cpp" not in other.partition("## What was removed")[0]
    assert "vllm serve" in other
    trusted = card(loading=replace(llama, remote_code=True)).text
    assert f"vllm serve {NAME} --trust-remote-code" in trusted
    assert "llama-quantize" not in trusted


def test_the_body_describes_a_training() -> None:
    """Tokens, divergence by source, scores before and after, the text with its licence, and the windows' file."""
    text = card(trained_report(), plots=("recovery",)).text
    parts = (
        "then trained on 122,880 tokens", "| code | 0.830 | 0.710 | 20.00 | 45.87 | 40.68 |", "](plots/recovery.png)",
        "| arc_easy (acc_norm) | 0.586 | 0.514 | 0.544 | 105.2% | 101.3–109.4% | 12 / 27 |",
        "| training text web | allenai/c4 (en, train): 48 windows, 210 documents, ODC-By 1.0 |",
        "(recover-generated.json)", "trained on the base model's predictions",
    )  # fmt: skip
    assert [part for part in parts if part not in text] == []
    assert "recover" not in card().text
    assert "(self-generated.json)" in card().text


def test_sources_of_a_training_do_not_reveal_local_folders() -> None:
    """Files are named without folders, in the table and in sentences; two of one name are told apart."""
    before = {"/home/ann/a/text.txt": 0.4, "/home/ann/b/text.txt": 0.5}
    recovery = trained(before, after={"/home/ann/a/text.txt": 0.2, "/home/ann/b/text.txt": 0.6})
    text = card(trained_report(recovery=recovery)).text
    assert "/home/ann" not in text
    assert "| text.txt | 0.400 | 0.200 |" in text
    assert "Further from the dense model than before the training: text.txt (2) (0.500 → 0.600)." in text


def test_how_to_load_is_three_lines() -> None:
    """The model's class, its tokenizer if it has one, and remote code if it needs it."""
    lines = card().text.split("```python\n")[1].split("```")[0].splitlines()
    assert lines == [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{NAME}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{NAME}")',
    ]
    other = card(loading=Loading("AutoModelForImageTextToText", tokenizer=False, remote_code=True)).text
    assert f'AutoModelForImageTextToText.from_pretrained("{NAME}", trust_remote_code=True)' in other
    assert "AutoTokenizer" not in other


def test_a_missed_gate_is_the_first_warning() -> None:
    """The warning with the figures precedes everything else."""
    report = sample_report(gate=gate(0.99, "fail"))
    refused = refusal(report)
    assert refused == "the gate was not passed: mean retention 94.83% (92.14–97.41%), required: at least 99.00%"
    text = card(report, refused=refused).text
    assert text.index("**This model did not meet its gate**") < text.index("How to load it")
    assert f"Gate: **not met**, {refused}" in text
    assert refusal(sample_report()) is None
    assert refusal(sample_report(gate=None)) is None


def test_missing_information_is_stated() -> None:
    """Without evaluation, gate, speed, licence and commit there are sentences, and no empty tables or fields."""
    written = card(bare_report(), Base("/home/ann/models/base", None, {}), plots=())
    assert {"base_model", "base_model_relation", "license", "language", "model-index"}.isdisjoint(
        written.data.to_dict()
    )
    parts = ("Nothing was evaluated", "No gate was set", "speed was not measured", "names no licence", "`base`, made")
    assert [part for part in parts if part not in written.text] == []
    assert "/home/ann" not in written.text
    assert "plots/" not in written.text


def test_text_of_the_user_is_escaped() -> None:
    """Fences in the recipe, bars in names and line ends in warnings do not change the layout."""
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
def test_sources_do_not_reveal_local_folders(place: str, public: str) -> None:
    """Files are named without folders; hub ids and packages are unchanged."""
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
def test_models_do_not_reveal_local_folders(place: str, public: str) -> None:
    """Paths with spaces, quotes, drives, shares, homes and file addresses are recognised; hub ids are unchanged."""
    assert public_name(place) == public
    assert public_name("models/base", local=True) == "base"


@pytest.mark.parametrize("text", [None, "", "no metadata", "---\n[broken\n---\n", "---\n- a list\n---\n"])
def test_an_unreadable_base_card_has_no_metadata(tmp_path: Path, text: str | None) -> None:
    """A missing or damaged card of the base model is treated as empty."""
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_metadata(tmp_path) == {}


def test_commit_message_and_card_describe_the_pruning() -> None:
    """One layer is singular, a local folder is not revealed, and a sparse model is not called smaller."""
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
    assert _message(trained_report()).endswith("20, 21 removed, trained on 122,880 tokens")


def test_charts_are_reproducible_pictures(tmp_path: Path) -> None:
    """Each PNG has the expected size, and equal figures give equal bytes."""
    drawn, again = (draw(trained_report(), tmp_path / name) for name in ("once", "again"))
    assert list(drawn) == ["importance", "error", "recovery"]
    for name, path in drawn.items():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert (width, height) == (1080, 420)
        assert again[name].read_bytes() == content
    assert draw(bare_report(), tmp_path / "bare") == {}
