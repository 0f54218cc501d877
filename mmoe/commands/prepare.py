"""Defines `mmoe prepare`, which makes prepared sources of raw recordings; also makes those that `mmoe train` misses."""

import multiprocessing
import os
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from mmoe.commands.arguments import Extending
from mmoe.commands.completion import complete_kind
from mmoe.commands.console import Console, console, show_record
from mmoe.commands.work_progress import work_progress
from mmoe.errors import MmoeError
from mmoe.runtime.interrupt import answered
from mmoe.runtime.logging import set_up_logging

if TYPE_CHECKING:
    from mmoe.data.config import SourceConfig
    from mmoe.preparation.source_report import Summary
    from mmoe.tokenizers.text import TextConfig

EngineName = Literal["processes", "ray"]  # as `mmoe.preparation.engines.Engine`, which would be slow to import here
GRACE_SECONDS = 10.0  # for a preparation to end by the Ctrl-C that has ended its parent


def prepare(
    kind: Annotated[
        str, typer.Argument(help="reader; `mmoe prepare KIND --help` lists its options", autocompletion=complete_kind)
    ],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="file or folder of raw recordings; - for a simulation")
    ],
    output: Annotated[Path, typer.Argument(help="folder of the prepared source")],
    options: Annotated[list[str] | None, typer.Argument(help="reader options, e.g. recordings=100")] = None,
    text_tokenizer: Annotated[str | None, typer.Option(help="tokenizer JSON; without it, plain bytes")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes; the output is the same for any number; default: what pays")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="ray: on a Ray cluster (RAY_ADDRESS), or a local one")
    ] = "processes",
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: delete what a broken-off call did")] = False,
    dedup: Annotated[bool, typer.Option("--dedup", help="leave out near duplicates too; equal ones always")] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="a prepared source whose samples are not to occur again; repeatable")
    ] = None,
    extensions: Extending = None,
) -> None:
    """Raw recordings -> indexed WebDataset shards with held-out recordings.

    An interrupted call keeps what it has finished; the same command goes on from there.
    """
    from mmoe.config.extensions import import_extensions
    from mmoe.config.load import merge, parse_overrides
    from mmoe.data.storage.store import DEFAULT_STORAGE
    from mmoe.tokenizers.text import TextConfig

    import_extensions(extensions or ())
    tokenizer = TextConfig(path=text_tokenizer).build(DEFAULT_STORAGE.read)
    duplicates: dict[str, object] = {"near": True} if dedup else {}
    duplicates |= {"against": against} if against else {}
    with answered(_answer):
        prepare_and_show(
            kind,
            source,
            output,
            text_tokenizer=tokenizer,
            workers=workers,
            engine=engine,
            fresh=fresh,
            options=merge(parse_overrides(options or []), {"prepare": {"dedup": duplicates}} if duplicates else {}),
        )


def _answer() -> str:
    return "stopping; what is finished is kept, and the same command goes on from there; again to kill"


def prepare_and_show(*arguments: Any, **options: Any) -> None:
    """Call `mmoe.preparation.prepare.prepare`, and show how far it is and what it has made."""
    from mmoe.preparation.prepare import prepare

    show_summary(prepare(*arguments, progress=partial(work_progress, console), **options).summary, console)


def show_summary(summary: "Summary", console: Console) -> None:
    """Print the table and the notes of a preparation."""
    table = Table(title=f"prepared {summary.kind}", title_justify="left")
    table.add_column("")
    for name in summary.splits:
        table.add_column(name, justify="right")
    for section in summary.sections:
        table.add_section()
        for line, cells in section.items():
            table.add_row(line, *cells)
    console.print(table)
    for note in summary.notes:
        console.print(note)


def prepare_missing(sources: "dict[str, SourceConfig]", text: "TextConfig", extensions: tuple[str, ...] = ()) -> None:
    """Make what a config names and the disk does not hold, in a process that ends with it and imports `extensions`.

    So the one that goes on to train has loaded no reader. Raises what the preparation raised for the user to read.
    """
    context = multiprocessing.get_context("spawn")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=_prepare_missing, args=(sender, sources, text, extensions))
    process.start()
    sender.close()
    try:
        with answered(_answer):
            error = answer.recv()
            process.join()
    except EOFError:
        process.join()
        why = "which was killed, often for lack of memory" if (process.exitcode or 0) < 0 else "which says why above"
        raise MmoeError(
            f"what is missing was prepared by process {process.pid}, {why}; what is finished is kept: give the same "
            "command again"
        ) from None
    finally:
        process.join(GRACE_SECONDS)
        process.terminate()
    if error is not None:
        raise error


def _prepare_missing(
    sender: Connection, sources: "dict[str, SourceConfig]", text: "TextConfig", extensions: tuple[str, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from mmoe.config.extensions import import_extensions
    from mmoe.preparation.ensure_prepared import ensure_prepared

    set_up_logging(show_record)
    try:
        import_extensions(extensions)
        ensure_prepared(sources, text, prepare_and_show)
    except (MmoeError, OSError) as error:
        sender.send(error)
    except KeyboardInterrupt:  # which its parent has got too
        sys.exit(130)
    else:
        sender.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a child alone
    parent.join()
    os._exit(1)
