"""Steps of ``make release`` and ``make wheel-test``; run by the Makefile from the repository's root.

release.py check VERSION    versions agree, the changelog has an entry, the tag is new, the tree is clean
release.py wheel-test       install dist/*.whl in a fresh environment and run the quickstart there
release.py tag VERSION      tag the commit; pushes nothing
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_WHEEL = (  # files beside the code that a wheel without which would work only in part
    "llmprune/py.typed",
    "llmprune/service/database/migrations/0001_jobs.sql",
    "llmprune/service/web/site/index.html",
    "llmprune/service/web/site/search/search_index.json",
    "llmprune/service/web/built/editor.js",
    "llmprune/service/web/static/style.css",
    "llmprune/service/web/templates/base.html.j2",
)


def check(version: str) -> list[str]:
    """Problems that stand against releasing this version, one sentence each."""
    problems = []
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        return [f"VERSION={version or '(none)'} is no version; write make release VERSION=1.2.3"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    package = re.search(r'^__version__ = "(.+)"$', (ROOT / "llmprune/__init__.py").read_text(encoding="utf-8"), re.M)
    for name, found in (("pyproject.toml", project), ("llmprune/__init__.py", package and package[1])):
        if found != version:
            problems.append(f"{name} has version {found}, not {version}; set it and commit")
    if f"\n## {version} – " not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        problems.append(f"CHANGELOG.md has no heading '## {version} – DATE'; add it and commit")
    if git("tag", "--list", f"v{version}"):
        problems.append(f"the tag v{version} exists already; choose another version")
    if git("status", "--porcelain"):
        problems.append("the working tree has changes; commit or remove them")
    return problems


def wheel_test() -> None:
    """Install the only wheel of ``dist`` in a fresh environment and run the quickstart with it."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    missing = set(IN_WHEEL) - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(sorted(missing))}; run make wheel")
    with tempfile.TemporaryDirectory() as folder:
        environment, run = Path(folder, "environment"), Path(folder, "run")
        python, uv = environment / "bin/python", str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
        # the overrides of pyproject.toml leave out what the demo's package asks for and llmprune does not use
        install: list[str | Path] = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
            "--constraint",
            ROOT / "constraints.txt",
        ]
        subprocess.run([*install, f"llmprune[demo] @ {wheel.as_uri()}"], cwd=ROOT, check=True)
        command: list[str | Path] = [
            environment / "bin/llmprune",
            "run",
            ROOT / "recipes/quickstart.yaml",
            "--output",
            run,
        ]
        tasks = ["--set", f"evaluation.include_path={ROOT / 'eval/tasks'}"]
        subprocess.run([*command, *tasks], cwd=folder, check=True)
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        where: list[str | Path] = [python, "-c", "import llmprune; print(llmprune.__file__)"]
        print(subprocess.run(where, cwd=folder, check=True, capture_output=True, text=True).stdout.strip())
    shrunk = report["pruned"]["parameters"] / report["dense"]["parameters"]
    print(f"{wheel.name}: the quickstart ran in a fresh environment; {shrunk:.1%} of the parameters are left")


def git(*arguments: str) -> str:
    """Output of a git command."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main(step: str, version: str = "") -> None:
    """Run one step."""
    if step == "wheel-test":
        wheel_test()
    elif step == "check":
        if problems := check(version):
            sys.exit("\n".join(["cannot release:", *(f"  - {problem}" for problem in problems)]))
    else:
        git("tag", "--annotate", f"v{version}", "--message", f"llmprune {version}")
        print(f"tagged v{version}; publish with: git push origin main v{version} && uv publish dist/*")


if __name__ == "__main__":
    main(*sys.argv[1:])
