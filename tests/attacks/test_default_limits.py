"""Limits without any option: time, memory and log of a job; time, memory and turn of a plan; the size of a config."""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.commands import command, save_model
from helpers.service import RECIPE, YAML, Bench, recipe
from helpers.tiny import structure_of
from transformers import AutoConfig, DeepseekV3Config, Gemma3nTextConfig, LlamaConfig

from llmprune import ModelError, Recipe, RecipeError
from llmprune.checkpoint.config_limits import MOST_BYTES, check_config
from llmprune.checkpoint.loading import load_config, load_tokenizer
from llmprune.recipe.model import ModelSource
from llmprune.service import memory, server
from llmprune.service.memory import machine_memory, memory_of, share_of_a_job
from llmprune.service.planner.planner import Planner
from llmprune.service.planner.queue import MOST_WAITING, PlannerBusy, PlanQueue, TooManyPlans
from llmprune.service.settings import Settings
from llmprune.service.supervisor import devices, overuse, supervisor
from llmprune.service.supervisor.processes import marked

MB = 10**6


def running(job: dict[str, Any]) -> bool:
    """Check whether a job's process has reported progress."""
    return job["state"] == "running" and job["total"] is not None


@pytest.fixture
def served_with(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which ``llmprune serve`` would serve."""
    found: list[Settings] = []
    monkeypatch.setattr(server, "serve", found.append)
    monkeypatch.setattr(devices, "_driver_names", lambda: ["0"])
    monkeypatch.setattr(devices, "find_gpus", tuple)
    return found


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that looks at memory and logs in every round."""
    monkeypatch.setattr(supervisor, "WEIGH_EVERY", 0.0)


# --- jobs


def test_a_job_may_run_for_a_day_and_longer_only_by_choice(tmp_path: Path, served_with: list[Settings]) -> None:
    """Without a limit of its own a job has the service's, which is a day; ``--time-limit 0`` is no limit."""
    bench = Bench(tmp_path)
    assert bench.submit()["time_limit"] == 86_400
    answer = bench.http.post("/v1/jobs", params={"time_limit": 86_401}, content=RECIPE, headers=YAML)
    said = "time_limit: 86,401 s asked and the limit is 86,400 s; ask for less"
    assert (answer.status_code, answer.json()["problems"]) == (422, [said])
    for options in ((), ("--time-limit", "60"), ("--time-limit", "0")):
        assert command("serve", "--data-dir", tmp_path / "data", *options).code == 0
    assert [settings.time_limit for settings in served_with] == [86_400, 60, None]


def test_a_job_queued_without_a_limit_has_the_service_s(tmp_path: Path) -> None:
    """A table of an earlier version, or of a service without a limit, has jobs that would run on for ever."""
    unlimited = Bench(tmp_path, time_limit=None)
    job = unlimited.submit(recipe(pause=30))
    assert job["time_limit"] is None
    bench = Bench(tmp_path, time_limit=0.3)
    ended = bench.until_ended(job["id"])
    assert ended["state"] == "failed"
    assert "it ran longer than its limit of 0.3 s" in ended["error"]


def test_jobs_share_the_memory_of_the_machine(tmp_path: Path, served_with: list[Settings]) -> None:
    """Slots and GPUs have equal shares by default; ``--memory-limit`` says otherwise, 0 is no limit."""
    for options in ((), ("--slots", "3", "--gpus", "0"), ("--memory-limit", "20GB"), ("--memory-limit", "0")):
        assert command("serve", "--data-dir", tmp_path / "data", *options).code == 0
    whole = 0.8 * machine_memory()
    assert [settings.memory_limit for settings in served_with] == [int(whole), int(whole / 4), 20 * 10**9, None]
    wrong = command("serve", "--memory-limit", "much")
    assert (wrong.code, "a size is a number with a unit" in wrong.err) == (2, True)


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of RAM and of the limits of the control groups around this process."""
    limits = [tmp_path / name for name in ("max", "small", "missing")]
    limits[0].write_text("max\n")
    limits[1].write_text("3000000\n")
    monkeypatch.setattr(memory, "_limit_files", lambda: limits)
    assert (machine_memory(), share_of_a_job(3)) == (3 * MB, 800_000)


@pytest.mark.usefixtures("weighed")
def test_a_job_that_uses_too_much_memory_is_ended_and_others_run_on(tmp_path: Path) -> None:
    """With all its processes, at once, and with a sentence that names the figure, the limit and what to do."""
    bench = Bench(tmp_path, slots=2, memory_limit=90 * MB)
    greedy = bench.submit(recipe(hoard=150, pause=30, deaf=1, leave=1))["id"]
    modest = bench.submit(recipe(hoard=20, pause=0.2))["id"]
    ended = bench.until_ended(greedy)
    assert ended["state"] == "failed"
    assert ended["error"].startswith("it used ")
    assert "a job may use 90 MB" in ended["error"]
    assert "--memory-limit" in ended["error"]
    assert marked(greedy) == []
    assert bench.until_ended(modest)["state"] == "succeeded"
    assert bench.http.post(f"/v1/jobs/{greedy}/retry").status_code == 200
    assert "a job may use" in bench.until_ended(greedy)["error"]


@pytest.mark.usefixtures("weighed")
def test_a_job_has_the_memory_of_each_of_its_gpus(tmp_path: Path) -> None:
    """The limit is one job's, or that of each GPU that it holds."""
    bench = Bench(tmp_path, gpus=("0", "1"), memory_limit=90 * MB)
    assert bench.until_ended(bench.submit(recipe(hoard=110, pause=0.3), gpus=2)["id"])["state"] == "succeeded"
    assert bench.until_ended(bench.submit(recipe(hoard=110, pause=30), gpus=1)["id"])["state"] == "failed"


@pytest.mark.usefixtures("weighed")
def test_the_processes_are_scanned_once_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs run; without a limit not at all."""
    scans: list[None] = []
    monkeypatch.setattr(overuse, "by_job", lambda: scans.append(None) or {})  # type: ignore[func-returns-value]
    bench = Bench(tmp_path, slots=3)
    jobs = [bench.submit(recipe(pause=30, n=n))["id"] for n in range(3)]
    bench.supervisor.round()
    scans.clear()
    bench.supervisor.round()
    assert len(scans) == 1
    bench.supervisor.settings = bench.settings.model_copy(update={"memory_limit": None})
    bench.supervisor.round()
    assert len(scans) == 1
    for job in jobs:
        bench.http.post(f"/v1/jobs/{job}/cancel")
    for job in jobs:
        bench.until_ended(job)


def test_mapped_weights_do_not_count(tmp_path: Path) -> None:
    """Pages of a file can be dropped at any time; memory that a process wrote cannot."""
    here = psutil.Process()
    (tmp_path / "weights").write_bytes(bytes(60 * MB))
    before = memory_of([here])
    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped.find(b"x") == -1  # every page is read
        assert memory_of([here]) - before < 20 * MB
        kept = bytearray(b"x") * (60 * MB)
        assert memory_of([here]) - before > 50 * MB
    del kept


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
def test_the_kernel_ends_a_job_rather_than_the_service(tmp_path: Path) -> None:
    """Every process of a job offers itself; the service does not."""
    bench = Bench(tmp_path)
    job = bench.submit(recipe(pause=30, leave=1))["id"]
    bench.until(job, running)
    scores = [int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in marked(job)]
    assert scores == [500, 500, 500]
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 500
    bench.http.post(f"/v1/jobs/{job}/cancel")
    bench.until_ended(job)


@pytest.mark.usefixtures("weighed")
def test_a_job_that_prints_without_end_is_ended(tmp_path: Path) -> None:
    """Its log is cut to half of the limit, so that a retry can write one too."""
    bench = Bench(tmp_path, log_limit=MB)
    job = bench.submit(recipe(flood=2, pause=30))["id"]
    ended = bench.until_ended(job)
    assert ended["state"] == "failed"
    assert "it wrote a log of 2 MB and the limit is 1 MB" in ended["error"]
    assert (bench.settings.log(job).stat().st_size, marked(job)) == (MB // 2, [])


# --- plans


def worker(program: str) -> tuple[str, ...]:
    """A stand-in for the process that makes plans: ``program`` sees each question as ``asked``."""
    head = "import json, sys, time\nfor line in sys.stdin:\n asked = json.loads(line)['recipe']\n "
    return sys.executable, "-c", head + program.replace("\n", "\n ") + "\n sys.stdout.flush()"


ECHO = "print(json.dumps({'plan': asked}))"


def test_a_plan_that_takes_too_long_keeps_its_caller_out_and_nobody_else(tmp_path: Path) -> None:
    """The worker is ended, the caller waits a minute, another caller's plan is made at once."""
    planner = Planner(tmp_path, worker(f"time.sleep(60 if asked == 'slow' else 0)\n{ECHO}"))
    try:
        planner.plan("quick", (), caller="ann")  # the process has started: its start counts as time of a plan
        planner.limit = 0.5
        assert "longer than 0.5 s" in planner.plan("slow", (), caller="mallory")["problems"][0]
        planner.limit = 60.0
        assert planner.plan("other", (), caller="ann") == {"plan": "other"}
        with pytest.raises(TooManyPlans, match="too much time or memory; ask again in 60 s") as refused:
            planner.plan("quick", (), caller="mallory")
        assert 50 < refused.value.wait <= 60
    finally:
        planner.close()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("held = bytearray(b'x') * (150 * 10**6); time.sleep(60)", "more than 100 MB of memory"),
        ("print('x' * 2_000_000)", "longer than 1 MB"),
        ("sys.exit(1)", "the process that makes plans ended"),
        ("print('no JSON')", "the process that makes plans ended"),
    ],
)
def test_a_plan_that_takes_too_much_is_not_remembered(tmp_path: Path, program: str, said: str) -> None:
    """Memory, an endless answer, a death: the caller is kept out, and for others the recipe is planned anew."""
    mark = f"mark = pathlib.Path({str(tmp_path / 'mark')!r})"
    first = f"import pathlib\n{mark}\nif not mark.exists():\n mark.touch()\n {program}"
    planner = Planner(tmp_path, worker(f"{first}\n{ECHO}"), memory=100 * MB)
    try:
        assert said in planner.plan("x", (), caller="mallory")["problems"][0]
        with pytest.raises(TooManyPlans):
            planner.plan("x", (), caller="mallory")
        assert planner.plan("x", (), caller="ann") == {"plan": "x"}
    finally:
        planner.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """A process that holds every descriptor up to 1,100, as a server with many connections does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    while held[-1] < 1_100:
        held.append(os.dup(held[0]))
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_plans_are_made_however_many_files_are_open(tmp_path: Path) -> None:
    """Many connections leave the worker descriptors that select() does not take."""
    planner = Planner(tmp_path, worker(ECHO))
    try:
        assert planner.plan("x", (), caller="ann") == {"plan": "x"}
    finally:
        planner.close()


def test_a_process_that_cannot_start_is_not_the_caller_s_fault(tmp_path: Path) -> None:
    """The answer says why and when to ask again; once the system starts processes, the same caller gets the plan."""
    planner = Planner(tmp_path, (str(tmp_path / "missing"),))
    try:
        with pytest.raises(
            PlannerBusy, match=r"cannot start \(No such file or directory\); ask again in a minute"
        ) as busy:
            planner.plan("x", (), caller="ann")
        assert not isinstance(busy.value, TooManyPlans)
        planner.command = worker(ECHO)
        assert planner.plan("x", (), caller="ann") == {"plan": "x"}
    finally:
        planner.close()


def test_a_plan_ends_with_the_service(tmp_path: Path) -> None:
    """A worker that is killed while it makes a plan gives a sentence, and no error in the service."""
    planner = Planner(tmp_path, worker("time.sleep(60)"))
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(planner.plan("x", (), caller="ann")))
    asking.start()
    wait_for(lambda: planner._worker)
    time.sleep(0.4)  # the thread waits for the answer
    planner.close()
    asking.join(10)
    assert "the process that makes plans ended" in answers[0]["problems"][0]
    assert planner._worker is None


def test_plans_are_remembered_and_problems_are_not(tmp_path: Path) -> None:
    """A hub that was away for a moment does not refuse a recipe for minutes."""
    counted = "count = globals().get('count', 0) + 1\nprint(json.dumps({asked: [count]}))"
    planner = Planner(tmp_path, worker(counted))
    try:
        assert [planner.plan("plan", (), caller="ann")["plan"] for _ in range(2)] == [[1], [1]]
        assert [planner.plan("problems", (), caller="ann")["problems"] for _ in range(2)] == [[2], [3]]
    finally:
        planner.close()


def test_penalties_double_and_are_forgotten() -> None:
    """1, 2, 4 … at most 60 minutes; a quiet hour after the last one it begins anew."""
    now = [0.0]
    queue = PlanQueue(clock=lambda: now[0])
    lengths = []
    for _ in range(8):
        queue.penalise("mallory")
        with pytest.raises(TooManyPlans) as refused, queue.place("mallory"):
            pass
        lengths.append(refused.value.wait / 60)
        now[0] += refused.value.wait
        with queue.place("mallory"):
            pass
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60]
    now[0] += 3600
    queue.penalise("mallory")
    with pytest.raises(TooManyPlans) as refused, queue.place("mallory"):
        pass
    assert refused.value.wait == 60


def test_one_plan_of_a_caller_and_few_of_all_wait() -> None:
    """So that waiting plans never hold all of the server's threads."""
    queue = PlanQueue()
    with ExitStack() as places:
        for number in range(MOST_WAITING):
            places.enter_context(queue.place(f"caller {number}"))
        with pytest.raises(TooManyPlans, match="a plan of yours is being made"), queue.place("caller 0"):
            pass
        with pytest.raises(PlannerBusy, match="8 others wait") as busy, queue.place("another"):
            pass
        assert not isinstance(busy.value, TooManyPlans)
    with queue.place("caller 0"), queue.place("another"):
        pass


def wait_for(reached: Callable[[], object]) -> None:
    """Until a condition holds."""
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_plan_of_the_same_caller_is_refused_at_once(tmp_path: Path) -> None:
    """Over HTTP with 429 and Retry-After, where another caller waits; the page says so and asks again by itself."""
    planner = Planner(tmp_path, worker("time.sleep(30)"), limit=30.0)
    bench = Bench(tmp_path, planner)
    headers = [
        YAML | {"Authorization": f"Bearer {bench.service.tokens.create(name, 'user')}"} for name in ("ann", "bob")
    ]

    def ask(number: int) -> Any:
        return bench.http.post("/v1/recipes/plan", content=RECIPE, headers=headers[number])

    first = threading.Thread(target=ask, args=(0,))
    first.start()
    try:
        wait_for(lambda: planner._worker)
        second = ask(0)
        assert (second.status_code, second.headers["Retry-After"]) == (429, "2")
        form = {"Authorization": headers[0]["Authorization"]}
        page = bench.http.post("/submit/plan", data={"recipe": RECIPE}, headers=form)
        assert page.status_code == 200
        assert 'hx-trigger="load delay:2s"' in page.text
        with ExitStack() as places:
            for number in range(MOST_WAITING - 1):
                places.enter_context(planner.queue.place(f"caller {number}"))
            third = ask(1)
        assert (third.status_code, third.headers["Retry-After"]) == (503, "60")
        assert bench.http.get("/v1/health").status_code == 200
    finally:
        assert planner._worker is not None
        planner._worker.kill()
        first.join(10)
        planner.close()
    kept_out = ask(0)
    assert kept_out.status_code == 429
    assert int(kept_out.headers["Retry-After"]) > 50


def test_a_number_of_layers_beyond_any_memory_is_refused(tmp_path: Path) -> None:
    """A plan counts the layers that would go; it makes no set of them."""
    save_model(tmp_path, tokenizer=False)
    text = f"model: {{id: {tmp_path}}}\ncalibration: {{dataset: org/text}}\ndepth: {{remove: {10**18}}}\n"
    with pytest.raises(RecipeError, match="remove at most 3"):
        structure_of(Recipe.parse(text))


# --- configs

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 5_000_000}, "num_hidden_layers is 5,000,000 and the most is 1,024"),
        ({"n_layer": 1025}, "n_layer is 1,025"),
        ({"num_hidden_layers": 5e6}, "num_hidden_layers is 5,000,000"),
        ({"text_config": {"vision_config": {"depth": 10**7}}}, "text_config.vision_config.depth is 10,000,000"),
        ({"hidden_size": 10**12}, "hidden_size is 1,000,000,000,000"),
        ({"intermediate_size": [64, 10**9]}, "intermediate_size is 1,000,000,000"),
        ({"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000 and the most is 67,108,864"),
        ({"num_experts": 10**6}, "num_experts is 1,000,000 and the most is 65,536"),
        ({"num_attention_heads": 10**6}, "num_attention_heads is 1,000,000"),
        ({"num_labels": 10**9}, "num_labels is 1,000,000,000"),
        ({"num_codebooks": 10**9}, "num_codebooks is 1,000,000,000 and the most is 16,777,216"),
        ({"moe_intermediate_size": 10**9}, "moe_intermediate_size is 1,000,000,000"),
        ({"kv_lora_rank": 10**9}, "kv_lora_rank is 1,000,000,000"),
        ({"d_ff": 10**9}, "d_ff is 1,000,000,000"),
        ({"mamba_expand": 10**9}, "mamba_expand is 1,000,000,000"),
        ({"conv_L_cache": 10**9}, "conv_L_cache is 1,000,000,000"),
        ({"first_k_dense_replace": 10**9}, "first_k_dense_replace is 1,000,000,000"),
        ({"multiple_of": 10**9}, "multiple_of is 1,000,000,000"),
        ({"head_dim": 10**4000}, "head_dim is more than 10^18"),
        ({"layer_types": ["full"] * 10**5}, "layer_types has 100,000 entries and the most is 65,536"),
        ({"rope_scaling": {"short_factor": [1.0] * 10**5}}, "rope_scaling.short_factor has 100,000 entries"),
        ({"configuration_files": ["config.4.0.0.json"]}, "names other files"),
    ],
)
def test_a_config_beyond_every_model_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], said: str
) -> None:
    """With a sentence, before transformers makes lists of layers or a model of it; also where a tokenizer is loaded."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("the config was read"))
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError) as refused:
            load(ModelSource(id=str(tmp_path)))
        assert said in str(refused.value)
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested hundreds deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "is nested deeper and the most is 32 levels"),
        (f'{{"a": "{"x" * MOST_BYTES}"}}', "it has 8 MB and the most is 8 MB"),
        (f'{{"{"k" * 1_000_000}": {{"hidden_layers": 5000}}}}', "hidden_layers is 5,000"),
    ],
)
def test_a_file_beyond_every_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """By its size and its nesting; a key of a megabyte is not repeated in the sentence."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said) as refused:
        load_config(ModelSource(id=str(tmp_path)))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=126, hidden_size=16_384, intermediate_size=53_248, vocab_size=128_256).to_dict(),
        DeepseekV3Config().to_dict(),
        Gemma3nTextConfig().to_dict(),
        {"num_hidden_layers": 315, "num_experts": 16_384, "vocab_size": 20_000_000, "num_labels": 50_257},
        {"rope_theta": 10**10, "max_position_embeddings": 10**30, "sliding_window": 2**63, "seed": 2**40},
        {"num_parameters": 7 * 10**10, "total_params": 10**12, "non_embedding_params": 10**11, "model_size": 7 * 10**9},
        {"train_tokens": 15 * 10**12, "num_tokens": 10**12, "num_input_tokens_seen": 10**12, "training_steps": 10**8},
        {"num_train_samples": 10**9, "dataset_size": 10**10, "total_size": 10**11, "train_batch_size": 2**25},
        {"created": 1_767_225_600, "timestamp": 1_767_225_600_000, "layer_rope_theta": 10**9, "total_flos": 10**24},
        {"max_seq_len": 10**9, "n_ctx": 10**9, "model_max_length": 10**30, "chunk_size": 10**9, "window_size": 10**9},
        {"time_step_limit": [0.0, float("inf")], "mask_value": -1e30, "attention_multiplier": 1e9},
        {"quantization_config": {"ignore": [f"model.layers.{n}.mlp.gate" for n in range(60_000)]}},
        {"id2label": {str(n): f"label {n}" for n in range(21_843)}},
        ["no", "mapping"],
    ],
)
def test_configs_of_the_largest_models_pass(config: Any) -> None:
    """Several times the largest published sizes, and numbers that are no sizes however large."""
    check_config(json.loads(json.dumps(config, default=str)), "model")
