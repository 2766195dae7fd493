"""The door: `luthier VERB`. Help costs milliseconds; errors are one line each, with the exit code of their class.

A verb is a file of this folder with a `command` (click.Command), imported only when it runs. VERBS lists them
with their one line of help, so that `luthier --help` imports nothing but click; a verb whose file is absent is
not listed. Exit codes: 0 done, 2 usage or recipe, 3 data or failed check, 4 checkpoint, 5 resources,
6 numeric, 130/143 stopped by a signal, 1 our own fault (`--debug` shows the traceback).
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from luthier.contracts.errors import LuthierError, ResourceError, UsageError

# verb -> its line in --help; the file is cli/VERB.py
VERBS: dict[str, str] = {
    "quickstart": "See it work: train, tune and score a small model here, in a few minutes.",
    "init": "Write a commented starter recipe.",
    "plan": "Will it fit, how long will it take, what to change; of a run: predicted and measured.",
    "train": "Train as a recipe says: luthier train RECIPE [path=value ...].",
    "data": "Rows as the model sees them: show, check; raw files to a clean set: build.",
    "generate": "One answer from a model, an adapter or a run.",
    "chat": "Talk to one or several targets side by side.",
    "evaluate": "Loss, perplexity and exact match on a file; pairs ranked right.",
    "merge": "Fold an adapter into its base model.",
    "cache": "What is kept between runs: ls, clean.",
    "runs": "Runs on disk: ls, show.",
    "recipes": "Recipes that come along: ls, cp.",
    "explain": "What a field of a recipe does, and why to change it.",
    "config": "The resolved recipe, and where each value comes from.",
    "schema": "The JSON Schema of recipes, for editors.",
}


class Verbs(click.Group):
    """Lists VERBS, imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in VERBS if Path(__file__).with_name(f"{verb}.py").exists()]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"luthier.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.list_commands(ctx), n=1)
            remedy = f"did you mean `luthier {close[0]}`?" if close else "see `luthier --help`"
            raise UsageError("no such verb", value=args[0], remedy=remedy)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, VERBS[verb]) for verb in self.list_commands(ctx)])


def program() -> str:
    """How a person calls this program from where they are: `luthier` where the PATH has it, else its file."""
    from shutil import which

    beside = Path(sys.executable).with_name("luthier")
    if which("luthier") or not beside.exists():
        return "luthier"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from luthier import __version__

        click.echo(f"luthier {__version__}")
        ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Every verb has --help. Start with `luthier quickstart`, then `luthier init`.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors (also after the verb).")
def door() -> None:
    """Luthier: from a base model and your rows to a tuned, merged and measured model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Every error ends here."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        result = door.main(given or ["--help"], prog_name="luthier", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped: interrupted", err=True)
        return 130
    except Exception as error:  # noqa: BLE001 - the last door: whatever it is becomes one line and a code
        return _report(error, debug)


def _report(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    else:
        _log(error)
    line, code = _line(error)
    click.echo(line, err=True)
    return code


def _line(error: Exception) -> tuple[str, int]:
    if isinstance(error, LuthierError):
        return error.line(), error.exit_code
    if isinstance(error, click.ClickException):
        context: Any = getattr(error, "ctx", None)
        path = context.command_path if context else "luthier"
        usage = UsageError(error.format_message().rstrip("."), where=path, remedy=f"see `{path} --help`")
        return usage.line(), usage.exit_code
    if isinstance(error, OSError) and error.filename is not None:  # a path that a person named, or a full disk
        kind = ResourceError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE) else UsageError
        refused = kind(f"the system refuses: {error.strerror}", where=str(error.filename))
        return refused.line(), refused.exit_code
    message, log = " ".join(f"{type(error).__name__}: {error}".split()), getattr(error, "run_log", None)
    trace = f"the traceback is in {log}" if log else "--debug shows the traceback"
    return f"internal: {message} — please report it; {trace}", 1


def _log(error: Exception) -> None:
    """The traceback goes to the log of the run, where the run is known (`error.run_log`)."""
    log = getattr(error, "run_log", None)
    if log:
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.writelines(traceback.format_exception(error))
        except OSError:
            click.echo(f"note: the traceback could not be written to {log}", err=True)
