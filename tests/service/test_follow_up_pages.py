"""Pages of follow-ups: the forms that make them, what they show, and what a finished job offers."""

from __future__ import annotations

import json

import pytest
from helpers.follow_ups import KINDS, cancelled, finished, made
from helpers.service import ServiceHarness


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with fake runs."""
    return ServiceHarness(tmp_path_factory.mktemp("follow-ups"), rate=1e6, burst=10**6)


@pytest.fixture(scope="module")
def parent(harness: ServiceHarness) -> str:
    """A finished job."""
    return finished(harness)


def page(harness: ServiceHarness, path: str) -> str:
    """Return a page as text."""
    text: str = harness.http.get(path, headers={"Accept": "text/html"}).text
    return text


def test_pages_offer_and_show_follow_ups(harness: ServiceHarness, parent: str) -> None:
    """The form of each kind makes its job, the parent lists it, and mistakes are said in words."""
    shown = page(harness, f"/jobs/{parent}")
    for kind in KINDS:
        assert f'name="kind" value="{kind}"' in shown
    forms: list[dict[str, str]] = [
        {"kind": "evaluate", "task-arc_easy": "on", "tasks": "piqa, arc_easy", "limit": "20"},
        {"kind": "size", "layers": "2"},
        {"kind": "bench", "batch_sizes": "1, 2", "contexts": "8", "new_tokens": "4", "repeats": "1"},
        {"kind": "recover", "tokens": "5M", "gpus": ""},
    ]
    for form in forms:
        answer = harness.http.post(f"/jobs/{parent}/follow-ups", data=form, follow_redirects=False)
        assert answer.status_code == 303, answer.text
        job = answer.headers["Location"].removeprefix("/jobs/")
        work = harness.job(job)["work"]
        assert work["kind"] == form["kind"]
        if form["kind"] == "evaluate":
            assert (work["tasks"], work["limit"]) == (["arc_easy", "piqa"], 20)
        assert "Made from" in page(harness, f"/jobs/{job}")
        assert f"/jobs/{job}" in page(harness, f"/jobs/{parent}")
        cancelled(harness, job)
    for wrong, said in (
        ({"kind": "evaluate"}, "choose at least one"),
        ({"kind": "recover", "tokens": "many"}, "a number of tokens"),
        ({"kind": "bench", "repeats": "x"}, "is no number"),
        ({"kind": "bench", "contexts": "9" * 3000}, "longer than"),
        ({}, "kind"),
    ):
        refused = harness.http.post(f"/jobs/{parent}/follow-ups", data=wrong, headers={"Accept": "text/html"})
        assert (refused.status_code, said in refused.text) == (422, True), refused.text


def test_the_page_of_a_bench_shows_its_figures(harness: ServiceHarness, parent: str) -> None:
    """Times, ratios and the device are a table; a file that cannot be read is left out."""
    job = made(harness, parent, "bench")["id"]
    cancelled(harness, job)
    assert "Speed and memory" not in page(harness, f"/jobs/{job}")
    pair = {name: {"median": 2.0, "low": 1.5, "high": 2.5} for name in ("base", "model", "ratio")}
    size = {"parameters": 1, "weights": 2000, "disk": None, "kv_bytes_per_token": 8, "decoded_bytes": 9, "joules": 0.1}
    point = {"batch_size": 1, "context": 512, "first_token": pair, "prefill": pair, "decode": pair, "peak": [0, 0]}
    told = {"base": "org/model", "model": "m", "base_size": size, "model_size": size, "points": [point], "repeats": 1}
    told |= {"new_tokens": 4, "cache": "dynamic", "device": "a GPU", "dtype": "float32"}
    harness.run_folder(job).mkdir(parents=True)
    (harness.run_folder(job) / "bench.json").write_text(json.dumps(told))
    shown = page(harness, f"/jobs/{job}")
    assert all(text in shown for text in ("1 prompt of 512 tokens", "<small>1.50 to 2.50</small>", "a GPU, float32"))


def test_code_that_loads_the_model(harness: ServiceHarness, parent: str) -> None:
    """The page has the lines for the downloaded folder; without a model it has none."""
    assert "from_pretrained" not in page(harness, f"/jobs/{parent}")
    config = harness.run_folder(parent) / "model" / "config.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "auto_map": {}}))
    shown = page(harness, f"/jobs/{parent}")
    assert f'AutoModelForCausalLM.from_pretrained("runs/{parent}/model"' in shown
    assert "trust_remote_code=True" in shown
    config.unlink()


def test_the_editor_begins_with_the_overrides(harness: ServiceHarness, parent: str) -> None:
    """Edit and run again opens the recipe as it ran, the new size included."""
    job = made(harness, parent, "size", layers=3)["id"]
    cancelled(harness, job)
    assert f"/submit?again={job}" in page(harness, f"/jobs/{job}")
    assert "remove: 3" in page(harness, f"/submit?again={job}")
