"""The command `energyreg`: conditional densities of a table's column, from the shell.

Each command is a function in a file of this folder. Whatever takes time to import waits inside these functions, so that
help and wrong usage are answered at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError as error:
    raise ImportError(
        "The command energyreg needs Typer, which is not installed. Install it with: pip install 'energyreg[tables]'",
        name="typer",
    ) from error

from energyreg import __version__
from energyreg.cli.console import FAILED, INTERRUPTED, WRONG_INPUT, stop
from energyreg.cli.evaluate import evaluate
from energyreg.cli.fit import fit
from energyreg.cli.info import info
from energyreg.cli.inputs import in_words
from energyreg.cli.options import Threads
from energyreg.cli.predict import predict, sample
from energyreg.cli.report import report
from energyreg.progress import terminated_as_interrupted

__all__ = ["app"]

EPILOG = (
    "Exit status: 0 done, 1 the run failed, 2 wrong usage or bad input, 130 interrupted (fit keeps the best model so "
    "far). Tables are CSV, Parquet or Feather, by their suffix; rows count from 1, without the header."
)

app = typer.Typer(
    name="energyreg",
    help="Predict the whole probability density of a table's column: intervals that hold, and never only a number.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass
class _Settings:
    """Options before the command."""

    debug: bool = False


_settings = _Settings()


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    _settings.debug = debug
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG_INPUT)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose errors are one line on stderr, and a status."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            with _warnings_in_a_line(), terminated_as_interrupted():
                command(*arguments, **options)
        except KeyboardInterrupt:
            stop("Stopped; nothing was written.", INTERRUPTED)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:  # who reads has had enough
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except Exception as error:
            if _settings.debug:
                traceback.print_exc()
            message, status = _explain(error)
            stop(in_words(message), status)

    return guarded


def _explain(error: Exception) -> tuple[str, int]:
    """The line that is shown for an error, and the exit status."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: there is no such file.", WRONG_INPUT
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}.", FAILED
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)) and message:
        return message, WRONG_INPUT
    if isinstance(error, ImportError) or type(error).__module__.startswith("energyreg."):
        return message, FAILED
    if isinstance(error, MemoryError):
        return "There is not enough memory; pass fewer rows.", FAILED
    return f"{type(error).__name__}: {message} (run `energyreg --debug ...` for the details)", FAILED


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        typer.echo(f"energyreg: {in_words(' '.join(str(message).split()))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and dropout.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the setting's own")] = None,
    full: Annotated[bool, typer.Option("--full", help="Larger models and several seeds.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds with --full, from --seed on.")] = 3,
    threads: Threads = 1,  # batches this small gain nothing by more
) -> None:
    """Train three kinds of density on the bundled protein table, and write a page that compares them."""
    from energyreg.cli.demo import run
    from energyreg.cli.model_file import use_threads

    use_threads(threads)
    run(output, seed, epochs, range(seed, seed + seeds) if full else None)


for _command in (fit, predict, sample, evaluate, report, info, demo):
    app.command(epilog=EPILOG)(_guarded(_command))
