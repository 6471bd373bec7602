"""The service under kills: SIGKILL at random instants, then every job and every result is checked."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from common import finish, record, run, write_recipe
from helpers.fake_run import finish as finish_fake
from helpers.postgresql import PostgresqlServer, remove_server
from helpers.postgresql import server as postgresql_server
from helpers.service import FAKE, free_port, kill, start, supervisor_of
from helpers.service import recipe as fake_recipe
from safetensors.torch import save_file
from service_requests import submit_under, wait_for

from llmprune.common.errors import ServiceError
from llmprune.service.client.sync.client import Client
from llmprune.service.settings import Settings
from llmprune.service.supervisor.processes import MARK, processes_of_job
from llmprune.testing import tiny_model

# everything: as where the machine loses its power; database: a connection, the server, or a writer amid its write
VICTIMS = ("service", "supervisor", "run", "keeper", "everything", "database")
_WRITE_AND_WAIT = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # pages go into the file before the end of the transaction
connection.execute("BEGIN IMMEDIATE")
connection.execute("DELETE FROM events")
connection.execute("UPDATE jobs SET state = 'failed', recipe = recipe || recipe, error = 'half written'")
print("written", flush=True)
time.sleep(600)
"""
KEEPER = "llmprune.service.supervisor.job_runner"


def tiny_recipes(folder: Path) -> list[Path]:
    """Three different runs of a few seconds beside their imports."""
    model = folder / "base"
    sizes = {"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 1024}
    tiny_model("llama", **sizes).save_pretrained(model)
    windows = torch.randint(128, (48, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": windows}, folder / "tokens.safetensors")
    calibration = {"tokens": str(folder / "tokens.safetensors"), "key": "tokens"}
    asked: list[dict[str, Any]] = [{"depth": {"remove": 3}}, {"width": {"mlp": 0.5}}]
    asked.append({"depth": {"remove": 2}, "width": {"mlp": 0.75}})
    return [
        write_recipe(folder / f"recipe-{number}.yaml", {"id": str(model)}, calibration, **sections)
        for number, sections in enumerate(asked)
    ]


def fake_recipes(folder: Path) -> list[Path]:
    """Three different runs of a few seconds without any work."""
    paths = [folder / f"recipe-{number}.yaml" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(fake_recipe(layers=6 + number, pause=0.6))
    return paths


def results(run_folder: Path) -> str:
    """SHA-256 over the names and bytes of a run's cut and checkpoint."""
    digest = hashlib.sha256()
    for path in (*run_folder.glob("cut.json"), *sorted((run_folder / "model").glob("*"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Census:
    """Counts the processes of every job, again and again, on a thread of its own."""

    most: Counter[tuple[str, str]] = field(default_factory=Counter)  # by job and by what kind of process it is
    looks: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Census:
        threading.Thread(target=self._count, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def _count(self) -> None:
        while not self.over.wait(0.05):
            found: dict[int, tuple[int, str, str]] = {}
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    if kind := kind_of(process.cmdline()):
                        found[process.pid] = process.ppid(), process.environ().get(MARK, ""), kind
            # a run that is about to start a program is there twice for an instant, as its own child
            now = Counter((job, kind) for parent, job, kind in found.values() if found.get(parent, ("",))[-1] != kind)
            self.most |= now
            self.looks += 1


def kind_of(command: list[str]) -> str | None:
    """True for the command of a job's runner or of the run itself."""
    if KEEPER in command:
        return "keeper"
    is_fake = command[1:3] == [*FAKE[1:], "run"]
    return "run" if is_fake or command[1:4] == ["-m", "llmprune", "run"] else None


@dataclass
class Ordeal:
    """A service that is killed again and again while jobs come in."""

    settings: Settings
    recipes: list[str]
    chance: random.Random
    client: Client
    server: subprocess.Popen[bytes]
    jobs: dict[str, int] = field(default_factory=dict)  # which recipe each is
    interrupted: Counter[str] = field(default_factory=Counter)  # how often each job lost its processes
    wrong: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    database: PostgresqlServer | None = None  # None: SQLite

    def submit_on(self) -> None:
        """Submit a job whenever fewer than four are under way, also while no service answers."""
        with Client(self.client.server) as client:
            while not self.over.wait(self.chance.uniform(0.0, 2.0)):
                try:
                    counts = client.page(limit=1).counts
                except ServiceError:
                    continue
                if counts["queued"] + counts["running"] < 4:
                    which = len(self.jobs) % len(self.recipes)
                    self.jobs[self._submit(client, which)] = which

    def _submit(self, client: Client, which: int) -> str:
        """Under one key until there is an answer, as a person's script would."""
        key = f"job {len(self.jobs)}"
        while True:
            with contextlib.suppress(ServiceError):
                return submit_under(client, key, self.recipes[which])

    def strike(self, victim: str) -> dict[str, Any]:
        """Kill one; bring back what does not come back by itself."""
        if victim == "database":
            return {"victim": victim, "doing": self._strike_database(), "then": "goes on"}
        job, processes = wait_for(self._running) if victim not in ("service", "supervisor") else (None, {})
        struck = {"victim": victim, "doing": self.client.job(job).shown.step if job else None}
        if victim in processes:
            self.interrupted[str(job)] += 1
            kill(processes[victim])
            return struck | {"then": self._fails_and_is_tried_again(str(job))}
        if victim in ("supervisor", "everything"):
            kill(supervisor_of(self.server.pid))
        if victim in ("service", "everything"):
            kill(self.server.pid)
            self.server.wait()
        if victim == "everything":
            for one in self.jobs:
                left = processes_of_job(one)
                self.interrupted[one] += bool(left)
                for process in left:
                    kill(process.pid)
        if victim != "supervisor":
            time.sleep(self.chance.uniform(0.0, 2.0))
            self.server = start(self.settings)
        return struck | {"then": "goes on"}

    def _strike_database(self) -> str:
        """End every connection, or the server itself; on SQLite a process that has half written a transaction."""
        if self.database is None:
            command = [sys.executable, "-c", _WRITE_AND_WAIT, str(self.settings.database)]
            writer = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert writer.stdout is not None, "piped"
            writer.stdout.readline()
            time.sleep(self.chance.uniform(0.0, 2.0))
            writer.kill()
            writer.wait()
            return "a writer amid its transaction"
        if self.chance.random() < 0.5:
            self.database.end_connections()
            return "every connection"
        self.database.stop(at_once=True)
        time.sleep(self.chance.uniform(0.0, 3.0))
        self.database.start()
        return "the server"

    def _running(self) -> tuple[str, dict[str | None, int]] | None:
        """A running job, and the process ids of its keeper and of its run."""
        running = [job.id for job in self.client.jobs(state="running")]
        for job in self.chance.sample(running, len(running)):
            with contextlib.suppress(psutil.Error):
                found = {kind_of(process.cmdline()): process.pid for process in processes_of_job(job)}
                if found.keys() >= {"keeper", "run"}:
                    return job, found
        return None

    def _fails_and_is_tried_again(self, job: str) -> str:
        """A job whose process is killed fails and says why, unless it was faster."""
        ended = wait_for(lambda: found if (found := self.client.job(job)).shown.ended else None)
        if ended.state == "succeeded":
            return "had ended"
        if ended.state != "failed" or "was killed" not in ended.shown.error:
            self.wrong.append(f"job {job} is {ended['state']} after a kill: {ended['error']}")
        ended.retry()
        return "failed, tried again"

    def judge(self, expected: list[str], census: Census) -> dict[str, Any]:
        """Hold every job against what it must have come to."""
        known = {job.id: job.shown for job in self.client.jobs(limit=500)}
        ended = {job: known[job].state if job in known else "lost" for job in self.jobs}
        for job in self.jobs:
            if ended[job] != "succeeded" or not self.settings.log(job).exists():
                self.wrong.append(
                    f"job {job} in the end: {known.get(job, 'lost')}; {[*self.settings.folder(job).glob('*')]}"
                )
        logs = [self.settings.log(job).read_text() for job in self.jobs if self.settings.log(job).exists()]
        equal = [results(self.settings.run_folder(job)) == expected[which] for job, which in self.jobs.items()]
        too_often = [job for job in self.jobs if job in known and known[job].attempts > 1 + self.interrupted[job]]
        keepers, runs = (max(n for (_, one), n in census.most.items() if one == kind) for kind in ("keeper", "run"))
        well = {*ended.values()} == {"succeeded"} and all(equal) and not (self.wrong or too_often)
        return {
            "jobs": len(self.jobs),
            "ended": dict(Counter(ended.values())),
            "strangers": len(known.keys() - self.jobs.keys()),
            "attempts": sum(job.attempts for job in known.values()),
            "more_attempts_than_interruptions": len(too_often),
            "looks_at_processes": census.looks,
            "most_keepers_of_a_job_at_once": keepers,
            "most_runs_of_a_job_at_once": runs,
            "refused_by_the_run_folders_lock": sum("another run is using" in log for log in logs),
            "wrong_states": self.wrong,
            "results_equal": f"{sum(equal)} of {len(equal)}",
            "all_well": well and (keepers, runs) == (1, 1),
        }


def undisturbed(recipe: Path, whole: Path, arguments: argparse.Namespace) -> str:
    """Return the results of a run that nothing kills, in the folder ``whole``."""
    if arguments.fake:
        whole.mkdir()
        os.environ.setdefault("LLMPRUNE_PROGRESS", str(whole.parent / "data" / "jobs" / "0" / "progress.json"))
        finish_fake(whole, recipe.read_text())
    else:
        finish(run(recipe, whole))
    return results(whole)


def measure_kills(folder: Path, arguments: argparse.Namespace) -> None:
    """SIGKILL at random instants of whoever takes part: every job must end well, once, with the same bytes."""
    recipes = fake_recipes(folder) if arguments.fake else tiny_recipes(folder)
    expected = [undisturbed(recipe, folder / f"whole-{number}", arguments) for number, recipe in enumerate(recipes)]
    database = postgresql_server() if arguments.database == "postgresql" else None
    settings = Settings(
        data_dir=folder / "data", port=free_port(), slots=2, allow_roots=(folder,),
        database_url=database.new_database() if database else None,
        **({"command": FAKE} if arguments.fake else {}),
    )  # fmt: skip
    chance = random.Random(0)
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(arguments.times)]
    chance.shuffle(victims)
    begin = time.monotonic()
    with Client(f"http://127.0.0.1:{settings.port}") as client, Census() as census:
        ordeal = Ordeal(
            settings, [path.read_text() for path in recipes], chance, client, start(settings), database=database
        )
        submitting = threading.Thread(target=ordeal.submit_on)
        submitting.start()
        try:
            kills = []
            for victim in victims:
                time.sleep(chance.uniform(2.0, arguments.pause))
                kills.append({"after_seconds": round(time.monotonic() - begin, 1)} | ordeal.strike(victim))
                print(kills[-1], flush=True)
            ordeal.over.set()
            submitting.join()
            wait_for(lambda: not any(client.page().counts[state] for state in ("queued", "running")), 1800)
            figures = ordeal.judge(expected, census)
        finally:
            ordeal.over.set()
            ordeal.server.terminate()
            ordeal.server.wait()
            remove_server()
        if not figures["all_well"]:
            print((folder / "serve.log").read_text(), file=sys.stderr)
        figures["processes_left"] = sum(len(processes_of_job(job)) for job in ordeal.jobs)
    about = {"database": arguments.database, "runs": "fake" if arguments.fake else "real"}
    about["seconds"] = round(time.monotonic() - begin)
    name = f"service-kills-{arguments.database}" if arguments.fake else "service-kills"
    record(name, about | {"kills": kills} | figures)
