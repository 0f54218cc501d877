"""Defines `mmoe fit-tokenizer`, which trains a text tokenizer on a source's own texts."""

from pathlib import Path
from typing import Annotated

import typer

from mmoe.commands.arguments import Extending
from mmoe.commands.completion import complete_kind
from mmoe.commands.console import console


def fit_tokenizer(
    kind: Annotated[str, typer.Argument(help="reader, as in prepare", autocompletion=complete_kind)],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="folder or file of raw recordings")],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="the tokenizer's JSON")],
    options: Annotated[list[str] | None, typer.Argument(help="reader options, e.g. recordings=100")] = None,
    vocabulary_size: Annotated[int, typer.Option(min=257, help="ids, the 256 bytes among them")] = 4096,
    extensions: Extending = None,
) -> None:
    """Train a byte-level BPE on the training texts of a source."""
    from mmoe.config.extensions import import_extensions
    from mmoe.config.load import parse_overrides
    from mmoe.preparation.prepare import training_texts
    from mmoe.tokenizers.text import TextTokenizer

    import_extensions(extensions or ())
    tokenizer = TextTokenizer.train(training_texts(kind, source, parse_overrides(options or [])), vocabulary_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output)
    console.print(f"{output}: {tokenizer.size} ids, fingerprint {tokenizer.fingerprint[:12]}")
