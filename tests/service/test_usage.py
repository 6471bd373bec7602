"""Use of the machine by a running job: samples, GPUs of the driver, the history on its page."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from helpers.service import ServiceHarness, recipe

from llmprune.service.monitoring.gpu_use import gpu_use, use_of
from llmprune.service.monitoring.sampler import Sampler
from llmprune.service.monitoring.usage import JobUsage, JobUse, UsageSample, read_usage, write_usage
from llmprune.service.web.job.run_charts import histories

SMI = """#!/bin/sh
echo '0, GPU-1234abcd, 97, 40960, 81559'
echo '1, GPU-9999ffff, [N/A], [N/A], 81559'
"""


def _sample(at: float) -> UsageSample:
    return UsageSample(at=at, cpu=50.0, memory=10**9, disk=None)


def test_a_long_job_keeps_a_bounded_history(tmp_path: Path) -> None:
    """Every second sample is dropped and samples are taken half as often; the newest stays."""
    usage = JobUsage()
    for at in range(1_000):
        usage = usage.with_sample(_sample(at))
    assert len(usage.samples) <= 240
    assert (usage.every, usage.samples[-1].at) == (5.0 * 2**7, 999.0)
    write_usage(tmp_path, usage)
    assert read_usage(tmp_path) == usage
    (tmp_path / "usage.json").write_text("{")
    assert read_usage(tmp_path) == JobUsage()


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and the beginnings of UUIDs name them; what the driver does not tell is unknown, not zero."""
    assert use_of(("0",), []) == ()
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    first, second, *rest = use_of(("GPU-1234", "1", "7"), gpu_use())
    assert (first.name, first.percent, first.memory) == ("GPU-1234", 97.0, 40960 * 2**20)
    assert (second.name, second.percent, second.memory, second.total) == ("1", None, None, 81559 * 2**20)
    assert not rest


def test_a_running_job_is_sampled(tmp_path: Path) -> None:
    """Memory, processors and files of its processes are in the API and on its page, and only its readers see them."""
    harness = ServiceHarness(tmp_path, memory_limit=10**9)
    job = harness.submit(recipe(layers=1, pause=60, hoard=30))["id"]
    folder = harness.settings.folder(job)
    harness.until(job, lambda found: found["step"] == "pass 2: cut and refit")
    sampler = Sampler(harness.settings, harness.service.jobs, remote_launchers=())
    sampler.sample()
    usage = read_usage(folder)
    write_usage(folder, usage.model_copy(update={"samples": (usage.samples[0].model_copy(update={"at": 1.0}),)}))
    sampler.sample()
    sampler.sample()  # not due yet
    found = harness.http.get(f"/v1/jobs/{job}/usage").json()
    assert len(found["samples"]) == 2
    assert found["samples"][-1]["memory"] > 30 * 10**6
    assert found["samples"][-1]["cpu"] is not None
    assert found["samples"][-1]["disk"] > 0
    assert found["memory_limit"] == 10**9
    page = harness.http.get(f"/jobs/{job}/usage").text
    assert page.count("<svg") == 3
    assert " of 1 GB" in page
    token = harness.service.tokens.create("bob", "user")
    harness.service.jobs.cancel(job)
    other = harness.http.get(f"/v1/jobs/{job}/usage", headers={"Authorization": f"Bearer {token}"})
    assert other.status_code == 404
    harness.supervisor.round()
    harness.supervisor._kill(harness.service.jobs.get(job))


def test_a_history_of_one_sample_and_of_unknown_figures_can_be_drawn() -> None:
    """What was never measured has no chart."""
    use = JobUse(every=5, samples=[_sample(1.0).model_copy(update={"cpu": 0.0})], memory_limit=None, disk_quota=None)
    assert [(one.name, one.now) for one in histories(use)] == [("Processors", "0 %"), ("Memory", "1 GB")]
    assert "NaN" not in "".join(one.chart for one in histories(use))
