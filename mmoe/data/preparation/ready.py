"""Preparing what a config names and the disk does not hold yet."""

from itertools import chain, islice
from pathlib import Path

from rich.console import Console

from mmoe.data.config import SourceConfig
from mmoe.data.preparation.prepare import prepare, training_texts
from mmoe.tokenizers.text import TextConfig, TextTokenizer

FIT_TEXTS = 500  # of each source, for the text tokenizer: making a sample may mean rendering it


def ensure_prepared(sources: dict[str, SourceConfig], text: TextConfig, console: Console) -> None:
    """Fit the text tokenizer where its file is missing, then prepare every source whose folder is missing.

    What exists is left as it is; whether it fits this config is for `Sources.check` to say.
    """
    missing = {name: source for name, source in sources.items() if not Path(source.shards).exists()}
    if text.path is not None and text.vocabulary_size is not None and not Path(text.path).exists():
        console.print(f"fitting {text.path} to the training texts of {', '.join(sources)}")
        texts = chain.from_iterable(
            islice(training_texts(s.kind, s.input, s.options), FIT_TEXTS) for s in sources.values()
        )
        Path(text.path).parent.mkdir(parents=True, exist_ok=True)
        TextTokenizer.train(texts, text.vocabulary_size).save(text.path)
    for name, source in missing.items():
        console.print(f"{source.shards} does not exist: preparing source {name}")
        tokenizer = text.build()
        prepare(
            source.kind,
            source.input,
            source.shards,
            text_tokenizer=tokenizer,
            workers=None,  # as many as the work is worth
            options=source.options,
            console=console,
        )
