"""Environment of all tests: one thread, a hub on this machine, and fixtures that several folders share."""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# A process makes its commands once, which takes as long as many a test; before typer.testing takes it over.
typer.main.get_command = functools.cache(typer.main.get_command)

# The imports of all tests make hardly any garbage; until they are done none is collected.
gc.disable()

# Read when huggingface_hub is imported. Nothing listens there until a test uses the hub, so that an accidental
# request is refused at once and does not reach the network.
_BOUND = socket.socket()
_BOUND.bind(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = "http://{}:{}".format(*_BOUND.getsockname())
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ.pop("HF_HUB_OFFLINE", None)

from helpers.hub.server import Hub  # noqa: E402  # after the address of the hub
from helpers.hub.state import TOKEN, User  # noqa: E402  # after the address of the hub
from helpers.postgresql import remove_server  # noqa: E402  # after the address of the hub

# Files of minutes with few tests: they begin first, so that no process of several works alone on one at the end.
_LONGEST = (
    *("test_real", "test_distributed", "test_families", "test_hub_real", "test_ray", "test_live"),
    *("test_memory_of_devices", "test_hub_run", "test_schema", "test_processes", "test_experts"),
)
_TOGETHER = ("browser",)  # folders whose tests share fixtures that are dear


_MANY = 20_000  # objects that are searched for garbage in the time of a quick test

# After pytest's own searches for garbage: triton reports objects that are left at the end of the process as leaks.
atexit.register(gc.unfreeze)


def pytest_collection_finish() -> None:
    """Leave what was imported out of every search for garbage, and search seldom: searches took 6 % of the time."""
    gc.freeze()
    gc.set_threshold(2_000, 10, 50)
    gc.enable()


def pytest_runtest_logfinish() -> None:
    """Leave out what a test has imported too: commands search whenever they give memory back."""
    if len(gc.get_objects()) > _MANY:
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    """Stop what all tests of this process shared."""
    remove_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files and folders first."""
    items.sort(key=lambda item: item.path.stem not in _LONGEST and item.path.parent.name not in _TOGETHER)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all files of some folders, whose tests share what is dear, to one process of several."""
    from xdist.scheduler import LoadFileScheduling

    class Folders(LoadFileScheduling):  # type: ignore[misc]  # has no types
        def _split_scope(self, nodeid: str) -> str:
            folder, _, _ = nodeid.partition("::")[0].rpartition("/")
            return folder if folder.rpartition("/")[2] in _TOGETHER else str(super()._split_scope(nodeid))

    return Folders(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One server for all tests of this process, on the socket in HF_ENDPOINT."""
    hub = Hub(_BOUND, tmp_path_factory.mktemp("lfs"))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def hub(hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub where the token in HF_TOKEN is that of ``ann`` of ``org``, with empty caches and no waits."""
    import datasets
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    from llmprune.common.hub import client as remote

    hub_server.users[TOKEN] = User("ann", orgs={"org": "write", "readers": "read"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(remote, "_sleep", hub_server.waits.append)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", Clock(hub_server.waits))
    remote.resolve_revision.cache_clear()
    yield hub_server
    remote.resolve_revision.cache_clear()
    hub_server.forget()


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify checkpoints in this process instead of a fresh one."""
    from helpers.commands import verify_here

    verify_here(monkeypatch)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, a tiny Llama with its tokenizer, ``text.txt`` and ``recipe.yaml``; no test changes it."""
    from helpers.commands import save_model, write_recipe, write_text

    folder: Path = tmp_path_factory.mktemp("workspace")
    write_recipe(folder / "recipe.yaml", save_model(folder / "base"), write_text(folder / "text.txt"))
    return folder


@pytest.fixture(scope="session")
def default_run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default recipe on the workspace; no test changes it."""
    from helpers.commands import prune_workspace, verify_here

    folder: Path = tmp_path_factory.mktemp("default-run")
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        assert prune_workspace(workspace, folder).code == 0
    return folder / "out"


@pytest.fixture
def finished(default_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run of the default recipe."""
    return Path(shutil.copytree(default_run, tmp_path / "out"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where transformers loads the weights of a model."""
    from helpers.commands import forbid_weights

    forbid_weights(monkeypatch)


class Clock:
    """The time module for the hub client, which records sleeps instead of sleeping."""

    def __init__(self, waits: list[float]) -> None:
        self.sleep = waits.append

    def __getattr__(self, name: str) -> object:
        import time

        return getattr(time, name)


_FOLDERS = itertools.count()


@pytest.fixture(autouse=True)
def _own_base_results(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep cached results of base models, and the rates of this machine, apart from those of the user."""
    from llmprune.evaluation.lm_eval import harness
    from llmprune.planning.duration import rates

    root = tmp_path_factory.getbasetemp()
    folder = root / f"baselines-{next(_FOLDERS)}"  # made by the few tests that keep results
    monkeypatch.setattr(harness, "baselines_folder", lambda: folder)
    kept = root / "rates.json"  # measured once for all tests
    monkeypatch.setattr(rates, "rates_file", lambda: kept)
