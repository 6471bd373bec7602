"""The public face, and the order of the rooms behind it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llmprune

PACKAGE = Path(llmprune.__file__).parent

# A room may import itself and these rooms. Nothing imports ``service`` and ``cli`` but the command line.
ROOMS: dict[str, set[str]] = {
    "common": set(),
    "anatomy": {"common"},
    "sparsity": {"common"},
    "criteria": {"common"},
    "layerwise": {"common", "anatomy"},
    "recipe": {"common", "criteria", "sparsity"},
    "data": {"common", "recipe"},
    "results": {"common", "recipe"},
    "report": {"common", "anatomy", "results"},
    "checkpoint": {"common", "anatomy", "layerwise", "recipe", "data"},
    "cut": {"common", "anatomy", "layerwise", "checkpoint"},
    "score": {"common", "anatomy", "criteria", "layerwise", "cut", "results"},
    "prune": {"common", "anatomy", "layerwise", "recipe", "checkpoint", "cut"},
    "search": {"common", "anatomy", "layerwise", "recipe", "cut", "score", "prune"},
    "recover": {"common", "anatomy", "layerwise", "recipe", "data", "results", "checkpoint"},
    "evaluation": {"common", "anatomy", "sparsity", "layerwise", "recipe", "data", "results", "checkpoint", "cut"},
    "planning": {
        *("common", "anatomy", "criteria", "layerwise", "recipe", "data", "results", "checkpoint", "cut"),
        "evaluation",
    },
    "publish": {"common", "anatomy", "recipe", "results", "checkpoint", "cut"},
    "pipeline": {
        *("common", "anatomy", "sparsity", "criteria", "layerwise", "recipe", "data", "results", "report"),
        *("checkpoint", "cut", "score", "prune", "search", "recover", "evaluation", "planning", "publish"),
    },
    "service": {"common", "recipe", "results"},
    "cli": {
        *("common", "anatomy", "recipe", "results", "report", "checkpoint", "evaluation", "planning", "publish"),
        *("pipeline", "service"),
    },
    "testing": {"anatomy"},
    "__main__": {"cli"},
}
# What a room takes of another beyond the table: one module of one module.
WINDOWS = {
    ("service.planner.worker", "planning.plan"),  # a process of its own, which imports torch
    ("service.planner.worker", "planning.timing"),
    ("service.jobs.follow_ups.reevaluation", "evaluation.more_samples"),
    ("service.jobs.follow_ups.recipes", "evaluation.more_samples"),
    ("service.jobs.job", "publish.published"),
    ("service.supervisor.progress", "publish.published"),
    ("service.jobs.uploads.uploads", "report.html.page"),
    ("service.web.compare", "report.html.interval_charts"),
    ("service.web.job.search", "report.html.search_section"),
}
MOST_ROOMS, MOST_FILES_BESIDE = 21, 6
STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)  # what an import can stand in
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "accelerate", "numpy"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the face itself left out."""
    found: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def room_of(module: str) -> str:
    """The first part of a module's name."""
    room = module.split(".")[0]
    assert room in ROOMS, f"{module} lies in no room of the table: add its room, and what it may import"
    return room


@cache
def imports(path: Path, typed: bool = False) -> list[tuple[int, str]]:
    """(line, module) of every import from llmprune, inside functions too; those for type checkers if ``typed``."""
    found: list[tuple[int, str]] = []
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found += [(node.lineno, _within(alias.name)) for alias in node.names if _is_ours(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, _within(name)) for name in names if _is_ours(name)]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typed:
            pending += node.orelse
        else:
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, STATEMENTS)]
    return found


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == "llmprune"


def _within(name: str) -> str:
    """The module of an imported name, without the package's own; empty: the package itself."""
    within = name.removeprefix("llmprune.")
    return within if within in modules() else within.rpartition(".")[0]


def test_all_is_sorted_complete_and_importable() -> None:
    """``__all__`` is sorted, every name in it can be had, and ``dir`` shows nothing else."""
    assert llmprune.__all__ == sorted(set(llmprune.__all__))
    for name in llmprune.__all__:
        thing = getattr(llmprune, name)
        assert thing.__module__.startswith("llmprune."), f"{name} is another library's"
        assert thing.__doc__
    assert dir(llmprune) == sorted([*llmprune.__all__, "__version__"])


def test_all_has_every_error() -> None:
    """Each exception that llmprune raises can be caught by its public name."""
    from llmprune.common import errors

    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds <= set(llmprune.__all__)


def test_face_hides_what_is_not_in_it() -> None:
    """Another name is an AttributeError that names it; the type checker's imports are those of ``__all__``."""
    with pytest.raises(AttributeError, match="'annotations_of'"):
        llmprune.annotations_of  # noqa: B018
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(llmprune.__all__)


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_room_imports_what_the_table_allows(module: str) -> None:
    """A module imports from its own room and from those that the table names."""
    room = room_of(module)
    forbidden = [
        f"line {line}: {imported}"
        for line, imported in imports(modules()[module])
        if imported and room_of(imported) not in {room, *ROOMS[room]} and (module, imported) not in WINDOWS
    ]
    assert not forbidden, f"{module} imports from rooms that {room} may not see: {forbidden}"


def test_the_table_allows_no_circle_and_nothing_that_is_not_used() -> None:
    """Arrows between rooms all go one way, and each stands for an import."""
    assert list(TopologicalSorter(ROOMS).static_order())
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    windows = set()
    for module, path in modules().items():
        for _, imported in imports(path):
            if imported and (module, imported) in WINDOWS:
                windows.add((module, imported))
            elif imported and room_of(imported) != room_of(module):
                used[room_of(module)].add(room_of(imported))
    unused = {room: ROOMS[room] - used[room] for room in ROOMS if ROOMS[room] - used[room]}
    assert (unused, WINDOWS - windows) == ({}, set()), "take these out of the table"


def test_the_house_stays_small() -> None:
    """A person reads the names of all rooms at once."""
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))]
    files = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    assert len(rooms) <= MOST_ROOMS
    assert len(files) <= MOST_FILES_BESIDE


def test_imports_have_no_circle() -> None:
    """No chain of imports leads back to where it began, through imports for type checkers neither."""
    graph = {
        name: {imported for _, imported in imports(path, typed=True) if imported} for name, path in modules().items()
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "anatomy"),
        (["run", "--help"], 0, "--fresh"),
        (["--version"], 0, llmprune.__version__),
        (["plan", "recipe.yaml"], 2, "model: is missing"),
        (["run", "recipe.yaml", "--set", "calibration.samples=0"], 2, "calibration.samples: must be"),
        (["eval", "model", "--tasks", "a,a"], 2, "named twice"),
    ],
)
def test_quick_answers_import_nothing_heavy(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    """Help, version and a wrong recipe are answered without torch and its like."""
    (tmp_path / "recipe.yaml").write_text("export: {}\n")
    program = f"""
import sys
from llmprune.cli.main import main
try:
    main()
finally:
    print("heavy:", *sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


def test_every_build_setting_is_one_that_hatch_reads() -> None:
    """A key in the wrong table of pyproject.toml is ignored without a word."""
    tables = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    read = {"packages", "include", "exclude", "only-include", "artifacts", "force-include", "sources"}
    assert {key for target in tables["targets"].values() for key in target} <= read
