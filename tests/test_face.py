"""The public face, and the order of the rooms behind it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llmprune

PACKAGE = Path(llmprune.__file__).parent

# A module imports from its own line or from lines below it.
LADDER = (
    ("cli", "__main__", "reference"),
    ("service",),
    ("pipeline", "comparison", "bench", "publishing", "reevaluation", "repeating"),
    ("choosing", "agreement"),
    ("workbench", "run_folder", "replacing", "accounting"),
    ("plan", "plan_notes", "checks"),
    ("inputs", "sizes", "interop", "needs", "rounding", "targets", "recipe", "problems"),
    (
        *(
            "scoring",
            "scored",
            "gradients",
            "trials",
            "standins",
            "stability",
            "prune",
            "repairs",
            "mixers",
            "readings",
            "normal_equations",
            "divergence",
            "up_projection",
            "gram",
            "folds",
            "sparsifying",
            "writers",
        ),
        *("snapshots", "residual", "criteria", "sparsity", "refit", "surgery"),
        *("evaluation", "report", "hub"),
    ),
    ("model",),
    (
        *("anatomy", "calibration", "data_cards", "texts", "text_files", "layer_choice"),
        *("cut", "scores", "progress", "testing", "remote"),
    ),
    ("files", "names", "schema", "errors", "printing", "console", "waiting", "time_limits", "yaml_reader"),
)
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "accelerate", "numpy"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the face itself left out."""
    found: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def height(module: str) -> int:
    """The rung of a module; 0 is the lowest."""
    room = module.split(".")[0]
    rungs = [rung for rung, rooms in enumerate(reversed(LADDER)) if room in rooms]
    assert len(rungs) == 1, f"{module} stands on no rung of the ladder: add its room where it belongs"
    return rungs[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import from llmprune, inside functions too, but not those for type checkers."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    known = modules()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "llmprune":
                within = name.removeprefix("llmprune.")
                yield node.lineno, within if within in known else within.rpartition(".")[0]


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
    from llmprune import errors

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
def test_imports_go_down(module: str) -> None:
    """A module imports from its own rung of the ladder or from below."""
    climbs = [
        f"line {line}: {imported or 'llmprune'}"
        for line, imported in imports(modules()[module])
        if imported and height(imported) > height(module)
    ]
    assert not climbs, f"{module} imports from above: {climbs}"


def test_imports_have_no_circle() -> None:
    """No chain of imports leads back to where it began."""
    graph = {name: {imported for _, imported in imports(path) if imported} for name, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "anatomy"),
        (["run", "--help"], 0, "--fresh"),
        (["--version"], 0, llmprune.__version__),
        (["plan", "recipe.yaml"], 2, "model: is missing"),
        (["run", "recipe.yaml", "--set", "model.id=x"], 2, "calibration: is missing"),
        (["eval", "model", "--tasks", "a,a"], 2, "named twice"),
    ],
)
def test_quick_answers_import_nothing_heavy(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    """Help, version and a wrong recipe are answered without torch and its like."""
    (tmp_path / "recipe.yaml").write_text("export: {}\n")
    program = f"""
import sys
from llmprune.cli import main
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
