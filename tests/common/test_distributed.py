"""Several processes under torchrun give the result of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands import launch
from helpers.commands import TASKS, command, save_model, verify_here, write_recipe, write_text
from helpers.decoders import dense_decoder
from huggingface_hub import constants
from safetensors.torch import load_file

from llmprune.anatomy.discovery import discover
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.activation import Activation
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.testing import tiny_model


def _run_in_one(folder: Path) -> str:
    """Run the recipe into ``one`` in the environment of accelerate's launcher, and return what was printed.

    The launcher would start one process with this environment, which takes twenty seconds of imports.
    """
    environments: list[dict[str, str]] = []
    arguments = ["--cpu", "--num_processes", "2", "-m", "llmprune"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch,
            "simple_launcher",
            lambda given: environments.append(launch.prepare_simple_launcher_cmd_env(given)[1]),
        )
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    (environment,) = environments
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setattr(constants, "HF_HOME", str(folder / "home-one"))
        patch.chdir(folder)
        verify_here(patch)
        done = command("run", "recipe.yaml", "--output", "one")
    assert done.code == 0, done.err
    return done.out + done.err


def _run_in_two(folder: Path) -> str:
    """Run the recipe into ``two`` by torchrun's agent, and return what was printed."""
    here = {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "home-two")}
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.in_two", "run", "recipe.yaml", "--output", "two"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | here | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recipe, run into ``one`` as accelerate's launcher starts it, and into ``two`` by two processes."""
    root = tmp_path_factory.mktemp("processes")
    held_out = {"dataset": "text.txt", "samples": 5, "sequence_length": 24, "batch_size": 2}
    tasks = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 5, "perplexity": held_out}
    sections = {"evaluation": tasks, "sparsity": {"pattern": "4:8"}, "refit": {"up": True}}
    write_recipe(root / "recipe.yaml", save_model(root / "dense"), write_text(root / "text.txt"), **sections)
    (root / "one.log").write_text(_run_in_one(root))
    (root / "two.log").write_text(_run_in_two(root))
    return root


def test_two_processes_equal_one(folder: Path) -> None:
    """The same layers and neurons stay, and the weights differ by float32 rounding only; but where two weights of a row
    have equal scores, rounding decides which is pruned, and later rows compensate for that one.
    """
    cuts = [load_file(folder / name / "cut.safetensors") for name in ("one", "two")]
    assert (folder / "one/cut.json").read_text() == (folder / "two/cut.json").read_text()
    assert cuts[0].keys() == cuts[1].keys()
    assert all(torch.equal(cuts[0][key], cuts[1][key]) for key in cuts[0])
    one, two = (load_file(folder / name / "model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        rows, others = (each.reshape(each.shape[0], -1) for each in (tensor, two[key]))
        apart = (rows - others).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-30)
        assert float(apart.median()) <= 1e-3, key


def test_held_out_text_is_shared(folder: Path) -> None:
    """Each process takes some of the batches, and the dense model's perplexity is one process's to the bit."""
    one, two = (json.loads((folder / name / "report.json").read_text())["perplexity"] for name in ("one", "two"))
    assert one["dense"] == two["dense"]
    assert two["pruned"] == pytest.approx(one["pruned"], rel=0.01)


def test_number_of_processes_is_said(folder: Path) -> None:
    """Under a launcher the run names the number of its processes: accelerate launch --cpu silently starts one."""
    assert "running in 2 processes on cpu" in (folder / "two.log").read_text()
    assert "running in 1 process on cpu" in (folder / "one.log").read_text()
    report = json.loads((folder / "two/report.json").read_text())
    assert report["provenance"]["processes"] == 2


def test_up_projections_are_judged_together(folder: Path) -> None:
    """The windows held out are shared too, and the same steps are taken."""
    found = [json.loads((folder / name / "report.json").read_text())["layers"] for name in ("one", "two")]
    one, two = ([layer["up_held_out"] for layer in layers if not layer["removed"]] for layers in found)
    assert any(one)
    assert two == pytest.approx(one, abs=1e-4)


def test_processes_share_the_samples(folder: Path) -> None:
    """Each process answers some of five documents; together they are those that one process answers, in order."""
    for side in ("dense_tasks", "pruned_tasks"):
        one, two = (
            json.loads((folder / name / "evaluation.json").read_text())[side]["tasks"][0] for name in ("one", "two")
        )
        assert [sample["doc_id"] for sample in two["samples"]] == list(range(5))
        for kept in ("doc_hash", "prompt_hash", "value"):
            assert [sample[kept] for sample in one["samples"]] == [sample[kept] for sample in two["samples"]]
        assert one["value"] == two["value"]


Met = tuple[list[list[dict[str, Any]]], list[str], list[int]]


@pytest.fixture(scope="module")
def met() -> Met:
    """Outcomes of every scenario in each of two processes, their standard error and their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.peers_scenarios", "--fresh"],
            cwd=Path(__file__).parents[1],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [one.communicate(timeout=120) for one in both]
    lines = [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]
    return lines, [err for _, err in outputs], [one.returncode for one in both]


@pytest.mark.slow
def test_a_slow_process_is_waited_for(met: Met) -> None:
    """A process that works for longer than a dead one may be silent is alive; sums and values are right."""
    for lines in met[0]:
        assert lines[0]["value"] == [3.0, 3.0, 3.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("place", "first", "second"),
    [
        (1, "PeerError: process 1 of 2 ended this run: layer 3 puts out NaN", "NumericalError: layer 3 puts out NaN"),
        (
            2,
            "process 0 of 2 is at a value of the first process (peers_scenarios.py:",
            "PeerError: process 1 of 2 is at a sum",
        ),
        (3, "process 0 of 2 and process 1 have different values of the recipe", "process 1 of 2 and process 0 have"),
        (4, "process 0 of 2 is at a value of the first process", "process 1 of 2 is at end"),
    ],
)
def test_an_error_or_a_disagreement_ends_both(met: Met, place: int, first: str, second: str) -> None:
    """Each process ends with a sentence that names the process and what happened to it, at once."""
    for lines, said in zip(met[0], (first, second), strict=True):
        found = lines[place]
        assert said in f"{found['error']}: {found['said']}"
        assert found["seconds"] < 20


def test_a_refit_takes_a_ridge_that_every_process_can_solve_with(met: Met) -> None:
    """Where one has no stable solution at the ridge that was found, both take the next stronger one."""
    found = [lines[5]["value"] for lines in met[0]]
    assert found[0] == found[1]
    assert found[0][0] == 3.0


def test_an_error_of_both_is_each_ones_own(met: Met) -> None:
    """Where all processes have the same error, such as one in the recipe, each raises it as a single process does."""
    for lines in met[0]:
        assert (lines[8]["error"], lines[8]["said"]) == ("NumericalError", "layer 3 puts out NaN")


def test_processes_retry_together_where_one_runs_out_of_memory(met: Met) -> None:
    """The other leaves the step where it waits for that one, in its middle or at its end; both begin it again with half
    the batch, until a batch fits.
    """
    places = "cuda:1 of process 1"
    sentences = [
        f"pass 1 ran out of memory on {places} with batches of 4 windows; it was repeated with 2",
        f"pass 2 ran out of memory on {places} with batches of 2 windows; it was repeated with 1",
    ]
    for lines in met[0]:
        assert lines[6]["value"] == [4.0, 4.0, 1, 2, sentences]


def test_both_processes_say_that_a_single_window_does_not_fit(met: Met) -> None:
    """With the device, the allocation that failed and what to do; one of them may say that the other ended."""
    for lines in met[0]:
        assert lines[7]["error"] in ("DeviceMemoryError", "PeerError")
        assert "pass 1, a single window at a time, on cuda:1 of process 1: GPU 1 is out of memory" in lines[7]["said"]
        assert "2 GiB more were needed; shorten each window with sequence_length, or" in lines[7]["said"]


def test_sums_of_one_type_travel_in_one_buffer(met: Met) -> None:
    """Every shape gets its sum; large tensors are exchanged where they are."""
    for lines in met[0]:
        found = lines[9]["value"]
        assert found["values"] == [[6.0], [10.0], [14.0], [], [9.0]]
        assert found["exchanges"] == [
            {"torch.float32": 1, "torch.float64": 1},
            {"torch.float32": 2, "torch.float64": 1},
        ]


def test_pass_1_exchanges_once_a_layer(met: Met) -> None:
    """All scorers of a layer together, in a buffer for each type of number, and both processes get the same scores.

    So do sources of which a process has no window, and one process that has all.
    """
    found = [lines[10]["value"] for lines in met[0]]
    assert found[0] == found[1]
    assert found[0]["exchanges"] == {"torch.float32": 4, "torch.float64": 4}
    assert found[0]["routed"] == 4 * 12 * 2 * 4  # windows, tokens, experts a token, layers
    model, ids_NL = tiny_model("mixtral"), torch.arange(3, 51).view(4, 12)
    criteria = ScoringCriteria(depth=BlockInfluence(), heads=Activation())
    for own, windows_NL in zip(found[0]["own"], (ids_NL[:1], ids_NL[1:]), strict=True):
        one = score(
            dense_decoder(model),
            discover(model.config),
            criteria=criteria,
            calibration=CalibrationBatches(windows_NL, 4),
        )
        assert one.layers is not None
        for values, wanted in zip(own, (one.layers, *one.heads.values()), strict=True):
            torch.testing.assert_close(torch.tensor(values), wanted, rtol=1e-4, atol=1e-6)


def test_a_process_that_is_gone_ends_the_other(met: Met) -> None:
    """Killed without a word, it is noticed by its silence; the other ends even in the middle of something, and says how
    the run continues: not with ``--fresh``.
    """
    _, errors, codes = met
    assert codes == [1, -9]
    last = errors[0].splitlines()[-1]
    assert last.startswith("llmprune: process 1 of 2 has given no sign of life for ")
    assert last.endswith("; run the same command again without --fresh to continue")
