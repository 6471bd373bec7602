"""The evaluation room: lm-eval on models in memory, retention, the gate, generation speed."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from llmprune.common.errors import EvaluationError, RecipeError
from llmprune.evaluation.bench.generation_speed import compare_speed
from llmprune.evaluation.lm_eval.backend import arguments, ask_backend, failure
from llmprune.evaluation.lm_eval.harness import in_memory, run_tasks
from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.evaluation.lm_eval.store import ResultStore
from llmprune.evaluation.lm_eval.tasks import check_tasks, fetch_tasks
from llmprune.evaluation.lm_eval.tokenizers import require_same_tokenizer
from llmprune.evaluation.more_samples import samples_to_ask
from llmprune.recipe.evaluation import Backend, Evaluation, Speed
from llmprune.results.evaluation_figures import BarFigures, GateFigures

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TASKS = str(Path(__file__).parents[2] / "eval" / "tasks")
AGREEMENT = Evaluation(tasks=("llmprune_agreement",), include_path=TASKS, limit=8)


def asked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, evaluation: Evaluation) -> TaskResults:
    """The results of a model in memory."""
    return run_tasks(lambda: in_memory(model, tokenizer, batch_size=evaluation.batch_size), evaluation)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the agreement task's first documents, without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (
        "[UNK]",
        "</s>",
        "The",
        "key",
        "keys",
        "near",
        "the",
        "cabinet",
        "cabinets",
        "is",
        "are",
        "was",
        "were",
    )
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")


def tiny_llama(layers: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama small enough to run in milliseconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def test_import_is_cheap() -> None:
    """Importing the room imports neither torch nor transformers nor lm-eval."""
    code = (
        "import sys; from llmprune.evaluation import gate, retention;"
        "from llmprune.evaluation.bench import generation_speed;"
        "from llmprune.evaluation.lm_eval import harness, store, tasks;"
        "sys.exit(' '.join({'torch', 'transformers', 'lm_eval', 'datasets', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_known_tasks_pass() -> None:
    """A task of the include folder and lm-eval's own tasks, groups and tags are known, quickly."""
    check_tasks(AGREEMENT)
    check_tasks(Evaluation(tasks=("llmprune_agreement", "arc_easy", "mmlu", "ai2_arc"), include_path=TASKS))


def test_unknown_task_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every misspelt task is named with its nearest valid name, before anything runs."""
    from llmprune.evaluation.lm_eval import tasks

    own = tasks._manager(Path(TASKS))  # lm-eval's full index takes 13 s
    monkeypatch.setattr(tasks, "_all_tasks", lambda folder: own)
    with pytest.raises(RecipeError) as caught:
        check_tasks(Evaluation(tasks=("llmprune_agrement", "nonsense"), include_path=TASKS))
    assert len(caught.value.problems) == 2
    assert "'llmprune_agrement'; did you mean 'llmprune_agreement'?" in caught.value.problems[0]


def test_missing_include_path() -> None:
    """An include folder that does not exist is named, even without tasks."""
    with pytest.raises(RecipeError, match=r"include_path: .*nowhere is not a folder"):
        check_tasks(Evaluation(include_path="nowhere"))


def test_run_tasks_is_deterministic_and_quiet(
    tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two runs give the same value sample by sample, print nothing and leave the tokenizer as it was."""
    model = tiny_llama(layers=2)
    first, second = (asked(model, tokenizer, AGREEMENT) for _ in range(2))
    assert first == second
    (task,) = first.tasks
    assert (task.task, task.metric, task.higher_is_better, len(task.samples)) == (
        "llmprune_agreement",
        "acc",
        True,
        8,
    )
    assert task.value == sum(sample.value or 0.0 for sample in task.samples) / 8
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")


def test_offloaded_model_is_used_where_it_lies(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model whose weights accelerate brings in layer by layer gives the same results."""
    import torch
    from accelerate import cpu_offload

    model = tiny_llama(layers=2)
    resident = asked(model, tokenizer, AGREEMENT)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert asked(offloaded, tokenizer, AGREEMENT) == resident
    assert compare_speed(offloaded, offloaded, settings=Speed(prompt_tokens=4, new_tokens=2, repeats=1)).ratio > 0


def test_ignored_fewshot_is_said(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    """A task that is defined without examples ignores num_fewshot, and says so."""
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        asked(tiny_llama(layers=1), tokenizer, AGREEMENT.model_copy(update={"num_fewshot": 2}))
    assert "num_fewshot 2 does not apply" in caplog.text


def test_primary_metric_is_the_first_listed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each task gives its first listed metric, with its direction."""
    (tmp_path / "data.py").write_text(
        "from datasets import Dataset\n"
        "def rows(**_):\n"
        "    return {'test': Dataset.from_list([{'text': 'The key is', 'n': n} for n in range(3)])}\n"
    )
    common = "custom_dataset: !function data.rows\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: 0\ndoc_to_choice: [near, key]\n'
        "metric_list: [{metric: acc_norm}, {metric: acc}]\n"
    )
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\n{common}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]\n'
    )
    evaluation = Evaluation(tasks=("choice", "rolling"), include_path=str(tmp_path))
    choice, rolling = asked(tiny_llama(layers=1), tokenizer, evaluation).tasks
    assert (choice.metric, choice.higher_is_better, len(choice.samples)) == ("acc_norm", True, 3)
    assert (rolling.metric, rolling.higher_is_better) == ("word_perplexity", False)
    assert rolling.value > 1
    assert {sample.value for sample in rolling.samples} == {None}


def test_agreement_documents_are_balanced(tokenizer: PreTrainedTokenizerFast) -> None:
    """200 different documents, and a model that always prefers one side gets half of them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    documents = list(manager.load(["llmprune_agreement"])["tasks"]["llmprune_agreement"].test_docs())
    assert len({(document["subject"], *sorted(document["verbs"])) for document in documents}) == 200
    assert sum(document["correct"] for document in documents) == 100
    singular = ("is", "was", "has", "seems", "looks")
    assert sum(document["verbs"][document["correct"]] in singular for document in documents) == 100


def test_unreachable_data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Data that cannot be read is named with its task and with what to set."""
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere/gone.jsonl}\n"
        "test_split: train\noutput_type: multiple_choice\n"
        "doc_to_text: x\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n"
    )
    with pytest.raises(EvaluationError, match=r"'gone' or its data \(json\) .*gone\.jsonl.*HF_ENDPOINT"):
        asked(tiny_llama(layers=1), tokenizer, Evaluation(tasks=("gone",), include_path=str(tmp_path)))


def test_speed_is_measured_pair_by_pair(capfd: pytest.CaptureFixture[str]) -> None:
    """A model of many layers is slower than one of few; generation settings stay, nothing is printed."""
    dense, pruned = tiny_llama(layers=12), tiny_llama(layers=1)
    dense.generation_config.temperature, dense.generation_config.do_sample = 0.3, True
    before = deepcopy(dense.generation_config)
    figures = compare_speed(dense, pruned, settings=Speed(batch_size=2, prompt_tokens=8, new_tokens=8, repeats=3))
    assert figures.ratio > 1
    assert figures.ratio_low <= figures.ratio <= figures.ratio_high
    assert (figures.repeats, figures.new_tokens) == (3, 8)
    assert figures.device.startswith("CPU")
    assert dense.generation_config == before
    assert capfd.readouterr() == ("", "")


def test_speed_needs_positions() -> None:
    """Prompt and new tokens that exceed the model's positions are refused with the limit."""
    model = tiny_llama(layers=1)
    with pytest.raises(RecipeError, match="exceed the model's 64 positions"):
        compare_speed(model, model, settings=Speed(prompt_tokens=60, new_tokens=8))


def write_tasks(folder: Path, **tasks: str) -> Path:
    """Task files over three documents; the texts are added to what they have in common."""
    folder.mkdir(exist_ok=True)
    (folder / "data.py").write_text(
        "from datasets import Dataset\n"
        "def rows(**_):\n"
        "    return {'test': Dataset.from_list([{'text': 'The key is', 'n': n} for n in range(3)])}\n"
    )
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ncustom_dataset: !function data.rows\ntest_split: test\n{text}"
        )
    return folder


CHOICE = (
    'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: 0\ndoc_to_choice: [near, key]\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
)
WRITTEN = (
    'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "near"\n'
    "generation_kwargs: {until: [x], max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    "filter_list:\n"
    "- {name: strict, filter: [{function: take_first}]}\n- {name: loose, filter: [{function: take_first}]}\n"
)


class Counting:
    """Opens one model, and fails while it is told to: what a stop in the middle looks like."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, fail_at: int | None = None) -> None:
        self.opened, self.asked, self.requests, self.fail_at = 0, 0, 0, fail_at
        self._tokenizer = tokenizer

    def __call__(self) -> Any:
        """A model that counts what it is asked."""
        self.opened += 1
        lm = in_memory(tiny_llama(layers=1), self._tokenizer, batch_size=2)
        original = lm.loglikelihood

        def counted(requests: Any, **more: Any) -> Any:
            self.asked += 1
            self.requests += len(requests)
            if self.asked == self.fail_at:
                raise KeyboardInterrupt
            return original(requests, **more)

        lm.loglikelihood = counted
        return lm


def test_interrupted_evaluation_continues(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """What was finished before the stop is not asked again, and a finished evaluation opens no model at all."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE, two=CHOICE)
    evaluation = Evaluation(tasks=("one", "two"), include_path=str(tasks))
    store = ResultStore(tmp_path / "store", "model")
    with pytest.raises(KeyboardInterrupt):
        run_tasks(Counting(tokenizer, fail_at=2), evaluation, store=store)
    second = Counting(tokenizer)
    results = run_tasks(second, evaluation, store=store)
    assert second.asked == 1
    third = Counting(tokenizer)
    assert run_tasks(third, evaluation, store=store) == results == run_tasks(Counting(tokenizer), evaluation)
    assert third.opened == 0


def test_more_samples_continue_after_the_earlier_ones(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Only further documents are asked, and the result is that of asking all at once; also where none is left."""
    whole = AGREEMENT.model_copy(update={"limit": 24})
    store = ResultStore(tmp_path / "store", "model")
    first = run_tasks(Counting(tokenizer), AGREEMENT, store=store).tasks[0]
    further = Counting(tokenizer)
    continued = run_tasks(further, whole, store=store, earlier=8)
    assert continued == run_tasks(Counting(tokenizer), whole)
    assert continued.tasks[0].samples[:8] == first.samples
    assert further.requests == 2 * (24 - 8)  # two choices of each document
    assert run_tasks(Counting(tokenizer), whole, store=store) == continued


@pytest.mark.parametrize(
    "text",
    [
        CHOICE + "num_fewshot: 1\nfewshot_split: test\n",
        CHOICE.replace("[{metric: acc}, {metric: acc_norm}]", "[{metric: mcc}]"),
    ],
)
def test_tasks_whose_answers_depend_on_earlier_ones_are_asked_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str
) -> None:
    """Drawn examples and a metric that is no mean over documents: all documents are asked again."""
    tasks = write_tasks(tmp_path / "tasks", one=text)
    short, long = (Evaluation(tasks=("one",), include_path=str(tasks), limit=limit) for limit in (2, 3))
    store = ResultStore(tmp_path / "store", "model")
    run_tasks(Counting(tokenizer), short, store=store)
    again = Counting(tokenizer)
    assert run_tasks(again, long, store=store, earlier=2) == run_tasks(Counting(tokenizer), long)
    assert again.requests == 2 * 3


def test_how_many_samples_a_gate_needs() -> None:
    """The bar that needs most decides, the documents are the limit, and what cannot help is refused."""
    bar = {"name": "mean", "min_retention": 0.9, "retention": 0.95, "interval": None, "verdict": "not enough samples"}
    gate = GateFigures(
        min_retention=0.9,
        confidence=0.95,
        retention=0.95,
        passed=False,
        verdict="not enough samples",
        bars=tuple(BarFigures(**bar | {"samples": 100, "samples_needed": needed}) for needed in (250, 320)),
    )
    assert samples_to_ask(gate, 50, documents=[1000, None], wanted=None) == 160
    assert samples_to_ask(gate, 50, documents=[120], wanted=None) == 120
    assert samples_to_ask(None, 50, documents=[120], wanted=80) == 80
    hopeless = gate.model_copy(update={"bars": (gate.bars[0].model_copy(update={"samples_needed": None}),)})
    for figures, limit, wanted, said in (
        (gate, None, 80, "every document"),
        (gate, 120, 200, "every document"),
        (gate, 50, 50, "ask for more"),
        (None, 50, None, "not short of samples"),
        (hopeless, 50, None, "in reach"),
    ):
        with pytest.raises(RecipeError, match=said):
            samples_to_ask(figures, limit, documents=[120], wanted=wanted)


def test_results_of_another_model_setting_or_file_are_not_taken(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another model, another limit, a changed task file, or a damaged file: the task runs again."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE)
    evaluation = Evaluation(tasks=("one",), include_path=str(tasks))

    def asks(evaluation: Evaluation = evaluation, identity: str = "model") -> int:
        opener = Counting(tokenizer)
        run_tasks(opener, evaluation, store=ResultStore(tmp_path / "store", identity))
        return opener.asked

    assert (asks(), asks()) == (1, 0)
    assert (asks(identity="pruned"), asks(identity="pruned")) == (1, 0)
    assert asks(evaluation.model_copy(update={"limit": 2}), "pruned") == 1
    (tmp_path / "tasks" / "data.py").write_text((tmp_path / "tasks" / "data.py").read_text() + "\n# changed\n")
    assert (asks(), asks()) == (1, 0)
    (tmp_path / "store" / "one.json").write_text('{"fingerprint": ')
    assert (asks(), asks()) == (1, 0)
    assert "the task runs again" in caplog.text


def test_a_shared_store_keeps_models_apart(tmp_path: Path) -> None:
    """In the cache of base models two models' results stand beside one another."""
    from helpers.task_results import result

    stores = [ResultStore(tmp_path, identity, shared=True) for identity in ("a", "b")]
    for store, value in zip(stores, (1.0, 0.0), strict=True):
        store.put(result(value, task="group/task"), "settings")
    kept = [store.get("group/task", "settings") for store in stores]
    assert [found and found.value for found in kept] == [1.0, 0.0]
    assert stores[0].get("group/task", "other settings") is None


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The work goes on without it."""
    from helpers.task_results import result

    (tmp_path / "file").write_text("")
    ResultStore(tmp_path / "file", "a").put(result(1.0), "settings")
    assert "not kept" in caplog.text


def test_groups_metrics_and_answers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Tasks know the group that was named, another metric and filter can be chosen, and texts are kept."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE, two=CHOICE, written=WRITTEN)
    (tasks / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    evaluation = Evaluation(
        tasks=("both", "written"),
        include_path=str(tasks),
        metrics={"two": "acc_norm", "written": "exact_match,loose"},
    )
    one, two, written = asked(tiny_llama(layers=1), tokenizer, evaluation).tasks
    assert [(task.task, task.group) for task in (one, two, written)] == [
        ("one", "both"), ("two", "both"), ("written", None),
    ]  # fmt: skip
    assert (one.metric, two.metric, written.metric, written.filter) == ("acc", "acc_norm", "exact_match", "loose")
    assert one.values.keys() == {"acc,none", "acc_norm,none"}
    assert [answer.prompt for answer in written.answers] == ["The key is"] * 3
    assert one.documents == 3


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"metrics": {"one": "acc_nrom"}}, "did you mean 'acc_norm'"),
        ({"metrics": {"other": "acc"}}, "'other' is no task that is evaluated"),
        ({"metrics": {"one": "acc,strict"}}, "no filter 'strict'"),
        ({"gate": {"min_retention": 0.9, "per_task": {"on": 0.9}}}, "'on' is not evaluated; did you mean 'one'"),
    ],
)
def test_names_that_the_tasks_do_not_have(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, wish: dict[str, Any], said: str
) -> None:
    """A metric, filter or task of the gate that is not there is refused with the nearest name."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE)
    evaluation = Evaluation.model_validate({"tasks": ("one",), "include_path": str(tasks), **wish})
    with pytest.raises(RecipeError, match=said):
        asked(tiny_llama(layers=1), tokenizer, evaluation)


def test_a_bar_for_a_group_without_a_figure_of_its_own_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group whose tasks have different metrics, and a tag, are refused when tasks are loaded; one metric is not."""
    from llmprune.evaluation.lm_eval import tasks as room

    monkeypatch.setattr(room, "_all_tasks", room._manager)  # for the tag; lm-eval's full index takes 13 s
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE, two=CHOICE + "tag: both_by_tag\n")
    (tasks / "both.yaml").write_text("group: both\ntask: [one, two]\n")

    def fetch(bar: str, **metrics: str) -> None:
        gate = {"min_retention": 0.9, "per_task": {bar: 0.9}}
        names = ("both_by_tag",) if bar == "both_by_tag" else ("both",)
        given = {"tasks": names, "include_path": str(tasks), "metrics": metrics, "gate": gate}
        fetch_tasks(Evaluation.model_validate(given))

    fetch("both")
    with pytest.raises(RecipeError, match=r"'both' have different metrics \(one by acc, two by acc_norm\)"):
        fetch("both", two="acc_norm")
    fetch("both", one="acc_norm", two="acc_norm")
    with pytest.raises(RecipeError, match="'both_by_tag' has no figure of its own; name single tasks, which are two"):
        fetch("both_by_tag")


def test_generation_that_stops_early_is_no_measure_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that generates fewer tokens than it was asked for gets a sentence."""
    model = tiny_llama(layers=1)
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda *given, **more: original(*given, **more)[:, :-1])
    with pytest.raises(EvaluationError, match="LlamaForCausalLM generated 3 tokens where 4 were asked for"):
        compare_speed(model, model, settings=Speed(prompt_tokens=8, new_tokens=4))


def test_backend_that_lm_eval_does_not_know() -> None:
    """A backend is named with its nearest, before anything runs."""
    with pytest.raises(RecipeError, match="no backend 'vlm'; did you mean 'vllm'"):
        check_tasks(Evaluation(backend=Backend(name="vlm")))


def test_backend_arguments() -> None:
    """The model's place goes where {model} stands, and to pretrained where nothing names a model."""
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
    """An OpenAI-style completions endpoint whose model finds every token with an even id likelier."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choices = []
        for index, ids in enumerate(asked["prompt"]):
            scores = [-0.5 if token % 2 == 0 else -3.0 for token in [*ids, 0]]
            top = [{"x": score} for score in scores]
            choices.append({"index": index, "text": "", "logprobs": {"token_logprobs": scores, "top_logprobs": top}})
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_tasks_by_an_endpoint(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """lm-eval's own client, in its own process, asks an OpenAI-style endpoint."""
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
    (task,) = ask_backend("unused", "pruned", evaluation=evaluation, store=store).tasks
    assert (task.value, len(task.samples)) == (1.0, 3)
    assert not (tmp_path / "store").exists()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Traceback …\nConnectionRefusedError: nobody there\n", r"the backend vllm failed \(exit code 1\): Connection"),
        ("", r"it said nothing; check evaluation\.backend"),
        ("noise\nllmprune: the task 'x' gave no metric\nmore noise", "^the task 'x' gave no metric$"),
    ],
)
def test_what_a_backend_said_last_is_said(said: str, error: str) -> None:
    """A backend that fails is named with its last line, and llmprune's own errors come through as they are."""
    assert re.search(error, failure("vllm", 1, said=said))


def test_tokenizers_that_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    """Another vocabulary, or the same words in another order, is named; a copy is the same."""
    from helpers.tiny import tiny_tokenizer

    require_same_tokenizer("a", tokenizer, model="b", other=deepcopy(tokenizer))
    with pytest.raises(EvaluationError, match="the tokenizers of a and b differ: 13 tokens and 257"):
        require_same_tokenizer("a", tokenizer, model="b", other=tiny_tokenizer())
    other = deepcopy(tokenizer)
    other.eos_token = "the"
    with pytest.raises(EvaluationError, match="eos_token_id is 1 and 6"):
        require_same_tokenizer("a", tokenizer, model="b", other=other)
