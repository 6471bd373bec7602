"""Evaluation by an lm-eval backend in its own process."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from helpers.lm_eval_tasks import CHOICE, write_tasks

from llmprune.common.errors import RecipeError
from llmprune.evaluation.lm_eval.backend import arguments, failure_message, run_backend
from llmprune.evaluation.lm_eval.store import ResultStore
from llmprune.evaluation.lm_eval.tasks import check_tasks
from llmprune.recipe.evaluation import Backend, Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_backend_that_lm_eval_does_not_know() -> None:
    """An unknown backend is refused with the nearest name."""
    with pytest.raises(RecipeError, match="no backend 'vlm'; did you mean 'vllm'"):
        check_tasks(Evaluation(backend=Backend(name="vlm")))


def test_backend_arguments() -> None:
    """The model replaces {model}, or becomes ``pretrained`` if no argument names a model."""
    plain = Backend(name="vllm", args={"max_model_len": 512})
    assert arguments(plain, "dense", place="/m") == {"max_model_len": 512, "pretrained": "/m"}
    endpoint = Backend(
        name="local-completions",
        args={"model": "m", "tokenizer": "{model}"},
        dense={"base_url": "a"},
        pruned={"base_url": "b"},
    )
    assert arguments(endpoint, "dense", place="/m") == {"model": "m", "tokenizer": "/m", "base_url": "a"}
    assert arguments(endpoint, "pruned", place="/m")["base_url"] == "b"


class _Endpoint(BaseHTTPRequestHandler):
    """OpenAI-style completions endpoint whose model prefers tokens with even ids."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choices = []
        for index, ids in enumerate(request["prompt"]):
            scores = [-0.5 if token % 2 == 0 else -3.0 for token in [*ids, 0]]
            top = [{"x": score} for score in scores]
            choices.append({"index": index, "text": "", "logprobs": {"token_logprobs": scores, "top_logprobs": top}})
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def test_tasks_by_an_endpoint(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's client evaluates an OpenAI-style endpoint in its own process, which is none of a run's several.

    Nothing is stored.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE)  # near has id 5, key has id 3: both odd
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    backend = Backend(
        name="local-completions",
        args={
            "model": "any",
            "tokenizer": str(tmp_path / "tokenizer"),
            "tokenizer_backend": "huggingface",
            "base_url": f"http://127.0.0.1:{server.server_port}/v1/completions",
            "max_retries": 1,
        },
    )
    text = (tasks / "one.yaml").read_text()
    (tasks / "one.yaml").write_text(text.replace("[near, key]", "[the, cabinet]"))  # ids 6 and 7: the first is likelier
    evaluation = Evaluation(tasks=("one",), include_path=str(tasks), backend=backend)
    store = ResultStore(tmp_path / "store", "model")
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    (task,) = run_backend("unused", "pruned", evaluation=evaluation, store=store).tasks
    assert (task.value, len(task.samples)) == (1.0, 3)
    assert not (tmp_path / "store").exists()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("stderr", "error"),
    [
        ("Traceback …\nConnectionRefusedError: nobody there\n", r"the backend vllm failed \(exit code 1\): Connection"),
        ("", r"no output; check evaluation\.backend"),
        ("noise\nllmprune: the task 'x' gave no metric\nmore noise", "^the task 'x' gave no metric$"),
    ],
)
def test_a_failing_backend_is_named_with_its_last_line(stderr: str, error: str) -> None:
    """The message ends the backend's output, or is the LLMPruneError that its process raised."""
    assert re.search(error, failure_message("vllm", 1, stderr=stderr))
