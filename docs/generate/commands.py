"""Command reference: every command, argument and option, from the help texts of the command line."""

from __future__ import annotations

from typing import Any


def command_reference(app: Any = None) -> str:
    """Markdown of every visible command of a typer app; default: of ``llmprune``."""
    root = click_command(app)
    commands = getattr(root, "commands", {})
    parts = []
    for name, command in commands.items():
        own = getattr(command, "commands", {})
        parts += [_command(f"llmprune {name} {verb}", one) for verb, one in own.items()] if own else []
        parts += [_command(f"llmprune {name}", command)] if not own and not command.hidden else []
    if any(not parameter.hidden for parameter in root.params):
        parts.append(_command("llmprune", root))
    return "\n\n".join(parts)


def click_command(app: Any = None) -> Any:
    """The click command of a typer app; default: of ``llmprune``."""
    import typer

    if app is None:
        from llmprune.cli.main import app as own

        app = own
    return typer.main.get_command(app)


def is_option(parameter: Any) -> bool:
    """True for an option, False for an argument."""
    return bool(parameter.opts[0].startswith("-"))


def _command(title: str, command: Any) -> str:
    """Heading, usage, help text, and one line for each argument and option."""
    parameters = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [_argument(parameter) for parameter in parameters if not is_option(parameter)]
    usage = " ".join([title, *arguments])
    lines = [f"- `{_spelling(parameter)}`: {_explanation(parameter)}" for parameter in parameters]
    return "\n\n".join(filter(None, [f"## `{title}`", f"    {usage}", _help_of(command), "\n".join(lines)]))


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _spelling(parameter: Any) -> str:
    if not is_option(parameter):
        return _argument(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or parameter.name.strip('_').upper()}"


def _explanation(parameter: Any) -> str:
    notes = []
    if is_option(parameter) and parameter.required:
        notes.append("required")
    if not callable(parameter.default) and parameter.default not in (None, False, [], ()):
        notes.append(f"default: `{parameter.default}`")
    text = " ".join((parameter.help or "").split())
    return f"{text} ({', '.join(notes)})" if notes else text


def _help_of(command: Any) -> str:
    return "\n".join(line.strip() for line in (command.help or "").split("\f")[0].strip().splitlines())
