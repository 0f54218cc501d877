"""Defines the command line: `mmoe <command>`, or `python -m mmoe <command>`."""

import errno
import os
import signal
import sys
from inspect import signature
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from mmoe import __version__
from mmoe.addresses import without_secrets
from mmoe.commands.clock_report import clock_report
from mmoe.commands.compare import compare
from mmoe.commands.config import config
from mmoe.commands.console import console, errors, show_record
from mmoe.commands.doctor import doctor
from mmoe.commands.estimate import estimate
from mmoe.commands.evaluate import evaluate
from mmoe.commands.export import export
from mmoe.commands.fit_tokenizer import fit_tokenizer
from mmoe.commands.generate import generate
from mmoe.commands.init import init
from mmoe.commands.inspect import inspect
from mmoe.commands.prepare import prepare
from mmoe.commands.reader_help import ReaderCommand
from mmoe.commands.report import report
from mmoe.commands.stages import stages
from mmoe.commands.train import train
from mmoe.commands.upcycle import upcycle
from mmoe.errors import ConfigError, MmoeError
from mmoe.runtime.interrupt import BY_SIGNAL, Interrupted
from mmoe.runtime.logging import set_up_logging
from mmoe.runtime.processes import end_torchrun

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    init,
    prepare,
    fit_tokenizer,
    config,
    stages,
    inspect,
    estimate,
    train,
    evaluate,
    generate,
    report,
    compare,
    export,
    upcycle,
    clock_report,
    doctor,
):
    app.command(cls=ReaderCommand if "kind" in signature(command).parameters else None)(command)

# What the machine refuses, and no fault of the program: it ends in a sentence.
OUTSIDE = {
    errno.ENOSPC: "make room, or name another folder",
    errno.EDQUOT: "make room, or name another folder",
    errno.EFBIG: "name a folder on another disk",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "change its rights, or name another",
    errno.EPERM: "change its rights, or name another",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a folder",
    errno.EEXIST: "name another",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its links lead in a circle: name another",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
}
INTERRUPTED = BY_SIGNAL + signal.SIGINT
WRONG = ConfigError.exit_code  # the same command would meet it again


def _print_version(asked: bool) -> None:
    if asked:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def begin(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and exit")
    ] = False,
) -> None:
    """Pre-train multimodal models, dense or with experts: from raw recordings to a report."""
    set_up_logging(show_record)


def main() -> None:
    """Run the command line; what a user or the machine is the cause of is printed as one sentence.

    Faults of the program keep their traceback.
    """
    try:
        app()
    except MmoeError as error:
        if error.exit_code == WRONG:
            end_torchrun()
        _fail(without_secrets(str(error)), error.exit_code)
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        what = f"{names}: " if names else ""
        _fail(f"{what}{os.strerror(error.errno)}; {OUTSIDE[error.errno]}")
    except KeyboardInterrupt:  # before a command has begun
        _fail("interrupted", INTERRUPTED)
    except Interrupted:
        raise
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _fail("interrupted", INTERRUPTED)
        if end.code == WRONG:  # a wrong command line
            end_torchrun()
        raise


def _fail(message: str, status: int = 1) -> NoReturn:
    """Say the sentence and end; what stdout still holds is dropped where it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    errors.print(Text("error", "bold red"), message, highlight=False, soft_wrap=True)
    sys.exit(status)
