"""Kills and a full disk: the same command again must end with the same checkpoint.

    python eval/benchmarks/faults.py kill [--times 20]
    python eval/benchmarks/faults.py disk         (mounts a small tmpfs: root only)

Each runs ``llmprune run`` in processes of its own and writes what it saw, with the machine,
into eval/benchmarks/results/faults-WHAT.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import SMOLLM2, TOPICS, finish, record, run, write_recipe


def contents(folder: Path) -> str:
    """SHA-256 over the names and bytes of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def small_recipe(folder: Path) -> Path:
    """A run of half a minute."""
    return write_recipe(
        folder / "recipe.yaml",
        {"id": SMOLLM2, "dtype": "float32"},
        {**TOPICS, "samples": 4, "sequence_length": 128},
        depth={"remove": 6},
        width={"mlp": 0.75},
    )


def measure_kills(folder: Path, arguments: argparse.Namespace) -> None:
    """SIGKILL at random instants, then the same command again: is the checkpoint the same, and what was done twice?"""
    recipe = small_recipe(folder)
    start = time.monotonic()
    finish(run(recipe, folder / "whole"))
    lasted = time.monotonic() - start
    expected = contents(folder / "whole" / "model")
    chance = random.Random(0)
    killed: list[dict[str, Any]] = []
    for _ in range(arguments.times):
        shutil.rmtree(folder / "run", ignore_errors=True)
        process = run(recipe, folder / "run")
        after = chance.uniform(0.15, 0.95) * lasted
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        progress = folder / "run" / "model.partial" / "progress.json"
        done = len(json.loads(progress.read_text())["records"]) if progress.is_file() else None
        half = (folder / "run" / "model").exists() and contents(folder / "run" / "model") != expected
        finish(run(recipe, folder / "run"))
        equal = contents(folder / "run" / "model") == expected
        killed.append({"after_seconds": round(after, 2), "layers_done": done, "half_model": half, "equal": equal})
    figures = {"seconds_uninterrupted": round(lasted, 2), "kills": killed, "all_equal": all(k["equal"] for k in killed)}
    record("faults-kill", figures)


def measure_full_disk(folder: Path, _: argparse.Namespace) -> None:
    """A tmpfs that another program fills up while pass 2 writes; then room is made, and the same command runs again."""
    recipe = small_recipe(folder)
    finish(run(recipe, folder / "whole"))
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", disk], check=True)
    try:
        process = run(recipe, disk / "run")
        while process.poll() is None and not list(disk.glob("run/model.partial/parts/layer-*")):
            time.sleep(0.02)
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):  # until it is full
            while file.write(bytes(1_000_000)):
                pass
        _out, said = process.communicate()
        half = (disk / "run" / "model").exists()
        ballast.unlink()
        before = time.monotonic()
        finish(run(recipe, disk / "run"))
        figures = {
            "exit_code": process.returncode,
            "said": [line.replace(str(folder), "FOLDER") for line in said.strip().splitlines() if "rror" in line],
            "half_model": half,
            "seconds_to_continue": round(time.monotonic() - before, 2),
            "equal": contents(disk / "run" / "model") == contents(folder / "whole" / "model"),
        }
    finally:
        subprocess.run(["umount", disk], check=False)
    record("faults-disk", figures)


def main() -> None:
    """Do one kind of damage in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "disk"])
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    measures = {"kill": measure_kills, "disk": measure_full_disk}
    with tempfile.TemporaryDirectory() as folder:
        measures[arguments.what](Path(folder), arguments)


if __name__ == "__main__":
    main()
