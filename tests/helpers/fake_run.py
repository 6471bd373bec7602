"""Fake of ``llmprune run``, ``push``, ``reevaluate`` and ``bench``: the same files, signals and exit codes, at once.

Lines ``# fake KEY VALUE`` of the recipe set its behaviour: ``layers``, ``pause`` (seconds at each layer), ``exit``
(exit code), ``say`` (printed text), ``deaf`` (1: ignores SIGTERM), ``leave`` (1: leaves a grandchild in a session of
its own), ``hoard`` (megabytes of memory), ``flood`` (megabytes of log), ``push_pause`` and ``push_exit`` (of a push of
its model), ``more_pause`` and ``more_exit`` (of all that works on its model), ``verdict`` (of its gate, with exit
code 3), ``samples`` (of its task, which has 1,000), ``figure`` (perplexity), ``config`` (1: its model has one),
``page`` and ``crash`` (texts in the report and in the last message), ``scores`` (1: has the scores of a run from its
beginning), ``report`` and ``told`` (whole texts of the report and of the progress file).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Run, push or evaluate more samples, as the recipe says."""
    if sys.argv[1] == "push":
        return push(Path(sys.argv[2]), dict(re.findall(r"--(\w\S*)=(.*)", "\n".join(sys.argv[3:]))))
    if sys.argv[1] == "bench" or any(word.startswith("--output=") for word in sys.argv):
        return work_on(Path(sys.argv[2]), dict(re.findall(r"--(\w\S*)=(.*)", "\n".join(sys.argv[3:]))))
    if sys.argv[1] == "reevaluate":
        require_base(dict(re.findall(r"--(\w\S*)=(.*)", "\n".join(sys.argv[3:]))))
        return evaluate_more(Path(sys.argv[2]), int(sys.argv[4]))
    recipe, folder = Path(sys.argv[2]), Path(sys.argv[4])
    for base in re.findall(r'^model\.id="(/.+/run/model)"$', "\n".join(sys.argv), re.MULTILINE):
        assert (Path(base) / "config.json").is_file(), base
    text = recipe.read_text(encoding="utf-8")
    behaviour = behaviour_of(text)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (folder / "TWICE").touch()
            sys.exit("llmprune: another run is using it")
        signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in behaviour else lambda *_: sys.exit(143))
        if "leave" in behaviour:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (folder / "arguments.json").write_text(
            json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": seen()})
        )
        print(behaviour.get("say", "working"), flush=True)
        hoarded = bytearray(os.urandom(1)) * (int(behaviour.get("hoard", 0)) * 10**6)
        print("x" * (int(behaviour.get("flood", 0)) * 10**6), end="", flush=True)
        if "scores" in behaviour:
            (folder / "scores.safetensors").touch()
            (folder / "run.json").write_text(json.dumps({"products": {"scores": {}}}))
        prune(folder, int(behaviour.get("layers", 2)), float(behaviour.get("pause", 0)), behaviour.get("told", ""))
        del hoarded
        if behaviour.get("exit", "0") in ("0", "3"):
            finish(folder, text)
            write_report(folder, behaviour, int(behaviour.get("samples", 50)), behaviour.get("exit", "0"))
        if behaviour.get("exit", "0") != "0":
            print(f"llmprune: it went wrong as asked {behaviour.get('crash', '')}".rstrip(), file=sys.stderr)
            sys.exit(int(behaviour["exit"]))
    return None


def seen() -> dict[str, str | None]:
    """Return the variables of devices, threads, the hub token and the artefact store."""
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_TOKEN_PATH", "AWS_SECRET_ACCESS_KEY")
    return {name: os.environ.get(name) for name in names}


def behaviour_of(text: str) -> dict[str, str]:
    """Return the behaviour that a recipe sets. ``HERE`` stands for the parent of the service's data folder."""
    text = text.replace("HERE", str(Path(os.environ["LLMPRUNE_PROGRESS"]).parents[3]))
    return dict(re.findall(r"^# fake (\w+) (.+)$", text, re.MULTILINE))


def behaviour_at(folder: Path) -> dict[str, str]:
    """Return the behaviour that a job's recipe sets; of a fetched run folder there is no recipe."""
    path = folder / "recipe.yaml"
    return behaviour_of(path.read_text(encoding="utf-8")) if path.is_file() else {}


def push(source: Path, options: dict[str, str]) -> None:
    """Write the record of a push without a hub."""
    behaviour = behaviour_at(source.parent)
    folder = Path(options["save"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    token = Path(os.environ["HF_TOKEN_PATH"]).read_text(encoding="ascii")
    (folder / "arguments.json").write_text(json.dumps({"argv": sys.argv[1:]}))
    print(f"pushing with {token}", flush=True)
    time.sleep(float(behaviour.get("push_pause", "0")))
    if "push_exit" in behaviour:
        print("llmprune: the hub said no", file=sys.stderr)
        sys.exit(int(behaviour["push_exit"]))
    published = commit_of(options["repo-id"])
    if "quantized-repo-id" in options:
        published["quantized"] = commit_of(f"{options['repo-id']}-fp8")
    Path(options["save"]).write_text(json.dumps(published))


def commit_of(repo: str) -> dict[str, object]:
    """Return the record of a push to a repository."""
    place = {"repo_id": repo, "commit": "c0ffee", "url": f"https://hub/{repo}/commit/c0ffee"}
    return place | {"pull_request": None, "files": 3, "bytes": 99}


def require_base(options: dict[str, str]) -> None:
    """Fail where the base model that the options name is not there."""
    for name in {"base", "against"} & options.keys():
        assert (Path(options[name]) / "config.json").is_file(), options[name]


def work_on(parent: Path, options: dict[str, str]) -> None:
    """Time or evaluate the model of another job; its recipe's ``more_pause`` and ``more_exit`` hold here too."""
    behaviour = behaviour_at(parent.parent)
    require_base(options)
    assert (parent / "model" / "model.safetensors").is_file()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"working on {parent}", flush=True)
    time.sleep(float(behaviour.get("more_pause", "0")))
    if "more_exit" in behaviour:
        sys.exit(int(behaviour["more_exit"]))
    if sys.argv[1] == "bench":
        Path(options["output"]).parent.mkdir(exist_ok=True)
        Path(options["output"]).write_text(json.dumps(behaviour.get("bench", "no figures")))
        return
    folder = Path(options["output"])
    folder.mkdir()
    (folder / "model").mkdir()
    os.link(parent / "model" / "model.safetensors", folder / "model" / "model.safetensors")
    (folder / "arguments.json").write_text(json.dumps({"argv": sys.argv[1:]}))
    (folder / "report.html").write_text("<!doctype html><title>report</title>")
    write_report(folder, behaviour, int(options.get("limit", "50")), "0")


def prune(folder: Path, layers: int, pause: float, instead: str = "") -> None:
    """Write layer after layer; existing ones are kept."""
    partial = folder / "model.partial"
    partial.mkdir(exist_ok=True)
    begin = time.monotonic()
    for layer in range(layers):
        told = {"step": "pass 2: cut and refit", "done": layer, "total": layers, "seconds": time.monotonic() - begin}
        partial_file = Path(os.environ["LLMPRUNE_PROGRESS"] + ".partial")
        partial_file.write_text(instead or json.dumps(told))
        partial_file.replace(os.environ["LLMPRUNE_PROGRESS"])
        path = partial / f"layer-{layer}"
        if not path.exists():
            time.sleep(pause)
            path.with_suffix(".new").write_text(f"{layer} of process {os.getpid()}")
            path.with_suffix(".new").rename(path)
            (partial / "progress.new").write_text(str(layer))
            (partial / "progress.new").rename(partial / "progress.json")


def finish(folder: Path, text: str) -> None:
    """Write the products of a finished run; equal recipes give equal bytes."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(hashlib.sha256(text.encode()).digest() * 64)
    said = behaviour_of(text).get("page", "")
    if "config" in behaviour_of(text):
        (folder / "model" / "config.json").write_text("{}")
    (folder / "report.html").write_text(f"<!doctype html><title>report</title><p>the report {said}")


def evaluate_more(folder: Path, limit: int) -> None:
    """Write a report on more samples of the same model."""
    behaviour = behaviour_at(folder.parent)
    assert (folder / "model" / "model.safetensors").is_file()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"evaluating {limit} samples", flush=True)
    time.sleep(float(behaviour.get("more_pause", "0")))
    code = behaviour.get("more_exit", "0")
    if code in ("0", "3"):
        write_report(folder, behaviour, limit, code)
    if code != "0":
        print("llmprune: no verdict as asked", file=sys.stderr)
        sys.exit(int(code))


def write_report(folder: Path, behaviour: dict[str, str], samples: int, code: str) -> None:
    """Write the report of a run, with a gate where it has one."""
    size = {"parameters": 100, "bytes": 400, "layers": 4}
    smaller = {"parameters": 60, "bytes": 240, "layers": 3}
    perplexity = {"dense": 10.0, "cut": None, "pruned": behaviour.get("figure", 11.0), "tokens": 9, "source": "text"}
    report = {"dense": size, "pruned": smaller, "perplexity": perplexity, "speed": None}
    verdict = "pass" if code == "0" else behaviour.get("verdict", "fail")
    bar = {"name": "mean", "minimum": 0.9, "measured": 0.9, "interval": None, "verdict": verdict}
    bar |= {"samples": samples, "samples_needed": 4 * samples if verdict == "not enough samples" else None}
    gate = {
        "min_retention": 0.9,
        "retention": 0.9,
        "passed": code == "0",
        "verdict": verdict,
        "confidence": 0.95,
        "bars": [bar],
    }
    report |= {"mean_retention": 0.9, "gate": gate if "verdict" in behaviour or code == "3" else None}
    report |= {"files": {"report": behaviour.get("page", "")}}
    report |= {"provenance": {"commit": "c0ffee"}}
    task = {"task": "one", "metric": "acc", "dense": 0.5, "pruned": 0.45, "retention": 0.9, "documents": 1000}
    task |= {"samples": samples, "lost": 5, "gained": 0}
    report |= {"recipe": {"evaluation": {"limit": samples}}, "tasks": [task]}
    (folder / "report.json").write_text(behaviour.get("report", json.dumps(report)))


if __name__ == "__main__":
    main()
