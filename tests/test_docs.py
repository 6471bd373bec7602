"""README and documentation: complete, true to the code, and every block that can run is run or parsed."""

from __future__ import annotations

import ast
import pkgutil
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from zlib import crc32

import pytest
import typer
import yaml
from generate import environment, hooks, results
from generate.commands import click_command, command_reference, is_option
from generate.recipe import recipe_reference
from generate.report_schema import report_schema
from helpers.recipes import BASE
from pydantic import BaseModel

import llmprune
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in
from llmprune.service.notifications.settings import NotificationSettings
from llmprune.service.settings import SITE, Settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
INJECTED = {"documentation", "command"}  # settings for tests, not for operators
_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    """Every fenced block of README and documentation."""
    for page in PAGES:
        for indent, language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
            lines = [line.removeprefix(indent) for line in text.splitlines()]
            yield Block(str(page.relative_to(ROOT)), language, "\n".join(lines) + "\n")


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every llmprune command in a block, and of those in prose that have an option."""
    found = []
    for block in blocks():
        joined = block.text.replace("\\\n", " ")
        found += [(block.page, line) for line in joined.splitlines() if re.match(r"(\$ )?llmprune [a-z]", line)]
        found += [(block.page, line.split("-m ")[1]) for line in joined.splitlines() if "-m llmprune " in line]
    for page in PAGES:
        prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
        for line in re.findall(r"`(llmprune [a-z][^`]* --[^`]*)`", prose):
            found.append((str(page.relative_to(ROOT)), " ".join(line.split())))
    return [(page, line) for page, line in dict.fromkeys(found) if ": " not in line]


def arguments_of(line: str) -> list[str]:
    """The arguments of a command line as a shell would pass them, without comment and redirection."""
    return shlex.split(line.removeprefix("$ ").replace("…", "X"), comments=True)[1:]


def blocks_in(language: str) -> list[Block]:
    """The different blocks of a language."""
    return [block for block in dict.fromkeys(blocks()) if block.language == language]


def block_name(block: Block) -> str:
    """Page and a digest of the text: the same in every process."""
    return f"{block.page}-{crc32(block.text.encode()) % 1000}"


def test_readme_is_short() -> None:
    """A person reads the README in five minutes."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_line_parses(page: str, line: str) -> None:
    """The command exists, and so does every option of the line."""
    name, *arguments = arguments_of(line)
    root = click_command()
    if name.startswith("-"):
        assert name in {opt for parameter in root.params for opt in parameter.opts}
        return
    assert name in root.commands, f"{page}: llmprune {name} is no command"
    command = root.commands[name]
    command.make_parser(typer.Context(command)).parse_args(list(arguments))


def test_make_verbs_exist() -> None:
    """Every ``make VERB`` of a page is a target that ``make help`` lists."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {verb for page in PAGES for verb in re.findall(r"[`\n]\s*make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert used
    assert used <= targets


@pytest.mark.parametrize("block", blocks_in("yaml"), ids=block_name)
def test_a_recipe_is_valid(block: Block) -> None:
    """A recipe, or a part of one on top of a small recipe, is accepted."""
    part = yaml.safe_load(block.text)
    assert set(part) <= set(Recipe.model_fields)
    Recipe.parse(yaml.safe_dump({**yaml.safe_load(BASE), **part}))


@pytest.mark.parametrize("block", blocks_in("python"), ids=block_name)
def test_python_compiles_and_imports(block: Block) -> None:
    """A Python block has no syntax error, and what it imports of llmprune is public."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "llmprune":
            assert {alias.name for alias in node.names} <= set(llmprune.__all__)


@pytest.mark.usefixtures("in_one_process")
def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python prunes a tiny model and loads the result."""
    from helpers.tiny import tiny_tokenizer

    from llmprune.testing import tiny_model

    monkeypatch.chdir(tmp_path)
    tiny_model("llama", vocab_size=260).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    Path("text.txt").write_text("Layers are scored on text that a person chose. " * 40, encoding="utf-8")
    text = {"dataset": "text.txt", "samples": 4, "sequence_length": 16}
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"model": {"id": "base"}, "calibration": text, "depth": {"remove": 1}}), encoding="utf-8"
    )
    loading, running = [block.text for block in blocks_in("python") if block.page == "README.md"]
    Path("running.py").write_text(running, encoding="utf-8")
    Path("loading.py").write_text(loading.replace("runs/quickstart", "runs/mine"), encoding="utf-8")
    report = runpy.run_path("running.py")["report"]
    assert runpy.run_path("loading.py")["model"].num_parameters() == report.pruned.parameters


def test_the_readme_has_recorded_results() -> None:
    """Every row of the README's table stands in the recorded results."""
    recorded = results.quality()
    rows = re.findall(r"^\| (\d.*|a quarter.*|half.*) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        target, own, peer = row.split(" | ")
        line = next(line for line in recorded.splitlines() if line.startswith(f"| {target} |"))
        assert f"| {own} |" in line
        assert f"| {peer} |" in line


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A section and all those inside it."""
    inner = [one for field in model.model_fields.values() for one in models_in(field.annotation)]
    return [model, *(deeper for one in inner for deeper in sections(one))]


@pytest.mark.parametrize("section", dict.fromkeys(sections(Recipe)), ids=lambda section: section.__name__)
def test_every_key_is_explained(section: type[BaseModel]) -> None:
    """Each key of a recipe has a description, and a row in the reference."""
    text = recipe_reference()
    for name, field in section.model_fields.items():
        if name != "kind":
            assert field.description, f"{section.__name__}.{name} has no description"
            assert f"{name}`" in text


def test_every_option_is_explained() -> None:
    """Each argument and option of each command has a help text."""
    silent = [
        f"{name} {parameter.opts[0]}"
        for name, command in click_command().commands.items()
        for parameter in command.params
        if is_option(parameter) and not parameter.hidden and not parameter.help
    ]
    assert not silent


def test_every_setting_is_explained() -> None:
    """A setting of the service is an option of ``llmprune serve`` or one of the documented fixed limits."""
    options = {parameter.name for parameter in click_command().commands["serve"].params}
    renamed = {
        "database_url": "database",
        "host_names": "host_name",
        "trusted_proxies": "trusted_proxy",
        "allow_roots": "allow_root",
        "webhook_hosts": "webhook_host",
        "mail_domains": "mail_domain",
        "oidc": "oidc_issuer",
    }
    names = {*Settings.model_fields, *NotificationSettings.model_fields} - {"notifications"}
    settings = {renamed.get(name, name) for name in names} - INJECTED
    assert settings <= options | set(environment.FIXED_LIMITS)
    assert set(environment.FIXED_LIMITS) <= settings


def test_every_environment_variable_is_explained() -> None:
    """Each variable that the package reads by name is in the table."""
    page = (ROOT / "docs/reference/exit-codes-and-environment.md").read_text(encoding="utf-8")
    read = r"""os\.environ(?:\.get\(|\[)"([A-Z_]+)"|"([A-Z_]+)" in os\.environ"""
    read += r'''|envvar="([A-Z_]+)"'''
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "llmprune").rglob("*.py")]
    names = {"".join(found) for source in sources for found in re.findall(read, source)}
    assert {"LLMPRUNE_TOKEN", "LLMPRUNE_SERVER"} <= names
    assert not [name for name in names if f"`{name}`" not in page]


def test_documented_modules_exist() -> None:
    """What mkdocstrings shows by ``::: NAME`` can be imported, so that the strict build finds it."""
    named = {
        name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert "llmprune.testing" in named
    assert all(pkgutil.resolve_name(name) for name in named)


def test_generated_parts_are_used_and_known() -> None:
    """A page names only parts that exist, every part is on a page, and none is empty."""
    named = {name for page in PAGES for name in hooks.MARK.findall(page.read_text(encoding="utf-8"))}
    assert named == set(hooks.PARTS)
    assert all(part().strip() for part in hooks.PARTS.values())


def test_the_built_site_loads_nothing_from_other_hosts() -> None:
    """No page of the built site has an inline script, or a script, style or image of another host."""
    pages = sorted(SITE.rglob("*.html"))
    if not pages:
        pytest.skip("the documentation is not built: make docs")
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert path.name == "404.html" or "<script>" not in page
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:", page), path


def test_recipe_reference_says_types_limits_and_defaults() -> None:
    """A row has the path, the type in words with its limits, the default and the meaning."""
    text = recipe_reference()
    assert "| `mlp` | number above 0, at most 1 | none | " in text
    assert "| `gate.min_retention` | number above 0, at most 1 | none |" in text
    assert "| `max_shard_size` | size, such as `5GB` | `5GB` |" in text
    assert "| `perplexity` | the keys of `calibration` | none |" in text
    assert "| `sources[].weight` | number above 0 | `1.0` |" in text


def test_report_schema_takes_comments_as_meanings() -> None:
    """A field's meaning is the comment beside it, inherited fields and parts inside parts included."""
    text = report_schema()
    assert text.startswith("## Report\n")
    assert "| `kv_bytes_per_token` | `int \\| None` | " in text


def test_command_reference() -> None:
    """Commands, arguments and options appear as a person types them, hidden ones do not."""
    app = typer.Typer()

    @app.command()
    def cut(
        recipe: Annotated[Path, typer.Argument(help="The recipe.")],
        *,
        output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder.")] = None,
        limit: Annotated[int, typer.Option(help="Most of them.")] = 3,
        fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
        secret: Annotated[bool, typer.Option("--secret", hidden=True)] = False,
    ) -> None:
        """Cut a model."""

    @app.command(hidden=True)
    def inner() -> None:
        """Serve a worker."""

    text = command_reference(app)
    assert "## `llmprune cut`\n\n    llmprune cut RECIPE\n\nCut a model.\n" in text
    assert "- `RECIPE`: The recipe.\n- `--output, -o DIR`: The folder.\n" in text
    assert "- `--limit LIMIT`: Most of them. (default: `3`)\n- `--fresh`: Start over." in text
    assert "secret" not in text
    assert "inner" not in text


def test_a_release_names_all_that_is_missing() -> None:
    """A wrong version is refused; a new one names the files that must say it."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    check: Any = runpy.run_path(str(ROOT / ".ci" / "release.py"))["check"]
    assert check("next") == ["VERSION=next is no version; write make release VERSION=1.2.3"]
    said = "\n".join(check("99.0.0"))
    assert all(name in said for name in ("pyproject.toml", "llmprune/__init__.py", "CHANGELOG.md"))
