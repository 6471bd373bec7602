"""The command ``llmprune`` and the order of its subcommands. ``--help`` imports no torch."""

from __future__ import annotations

import copy
import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmprune import __version__
from llmprune.cli.check_command import check
from llmprune.cli.hub_commands import inspect, push
from llmprune.cli.model_commands import anatomy, bench, evaluate
from llmprune.cli.options import CommandLine
from llmprune.cli.path_errors import path_problem
from llmprune.cli.recover_commands import recover
from llmprune.cli.report_commands import compare, report
from llmprune.cli.run_commands import plan, reevaluate, run
from llmprune.cli.search_command import search
from llmprune.cli.speed_commands import speed
from llmprune.common.errors import LLMPruneError, TrainingStopped, to_continue
from llmprune.common.hub.secrets import redact, redact_logs
from llmprune.common.printing import print_lines, printable_message
from llmprune.service.cli import commands as service_commands
from llmprune.service.cli import library_commands
from llmprune.service.cli.follow_up_commands import app as follow_up_commands

_CONTINUED = ("run", "search", "recover")  # commands that go on where they were stopped


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run in the same way as Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service and a launcher both send it
    raise _Terminated


class _CommandGroup(TyperGroup):
    """Commands that explain Ctrl-C and SIGTERM, and accept ``-v`` after the command as well as before it."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with the hidden option ``-v``."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and not any(option.name == "verbose" for option in command.params):
            option: Any = copy.copy(next(option for option in self.params if option.name == "verbose"))
            option.expose_value, option.hidden = False, True
            option.callback = lambda _context, _option, verbose: _log_to_stderr(logging.INFO) if verbose else None
            command.params.append(option)
        return command

    def invoke(self, ctx: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            again = f"; {to_continue()}" if ctx.invoked_subcommand in _CONTINUED else ""
            if isinstance(stop, TrainingStopped):
                again += "; --end-recovery takes the best weights so far"
            typer.echo(f"llmprune: {stop if isinstance(stop, TrainingStopped) else 'stopped'}{again}", err=True)
            raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None


app = typer.Typer(
    name="llmprune",
    cls=_CommandGroup,
    help="Prune large language models in depth and width: a recipe in, an ordinary checkpoint with its proof out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more; also after a command.")] = False,
) -> None:
    _log_to_stderr(logging.INFO if verbose else logging.WARNING)
    if version:
        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


_COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "search": search,
    "run": run,
    "recover": recover,
    "push": push,
    "inspect": inspect,
    "reevaluate": reevaluate,
    "eval": evaluate,
    "bench": bench,
    "speed": speed,
    "report": report,
    "compare": compare,
    "anatomy": anatomy,
    "check": check,
}
for _name, _command in _COMMANDS.items():  # in the order of --help
    app.command(_name)(_command)
service_commands.add_to(app)
app.add_typer(follow_up_commands, name="follow-up")
library_commands.add_to(app)


def _log_to_stderr(level: int) -> None:
    """Log llmprune's own messages; the loggers of libraries keep their handlers and levels."""
    logger = logging.getLogger("llmprune")
    logger.handlers = [logging.StreamHandler()]
    print_lines(logger)
    redact_logs()
    logger.setLevel(level)


def _command_line() -> CommandLine | None:
    """Return the command line of this process; None where another program calls ``main`` with its own arguments."""
    given = sys.argv[1:]
    return CommandLine((sys.executable, *sys.orig_argv[1:])) if sys.orig_argv[-len(given) :] == given else None


def main() -> None:
    """Run the command line; errors for people become one message and an exit code."""
    try:
        app(obj=_command_line())
    except LLMPruneError as error:
        typer.echo(f"llmprune: {printable_message(redact(str(error)))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        problem = path_problem(error)
        if problem is None:
            raise
        typer.echo(f"llmprune: {printable_message(redact(problem))}", err=True)
        sys.exit(2)
