"""Prepares what a config names and the disk does not hold yet; only a command that says so does this."""

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from mmoe.addresses import is_missing, local_path
from mmoe.data.config import SourceConfig
from mmoe.data.storage.store import DEFAULT_STORAGE
from mmoe.errors import ConfigError, MmoeError
from mmoe.files import said_nearest
from mmoe.preparation.prepare import PrepareConfig, prepare, training_texts
from mmoe.preparation.sources import SOURCES
from mmoe.tokenizers.text import TextConfig, TextTokenizer

logger = logging.getLogger(__name__)

FIT_TEXTS = 500  # of each source, for the text tokenizer: making a sample may mean rendering it
NO_INPUT = "-"  # of a simulation

_OPTION = re.compile(rf"(?<![\w./])(?=prepare\.(?:{'|'.join(PrepareConfig.model_fields)})\b)")


def ensure_prepared(sources: dict[str, SourceConfig], text: TextConfig, make: Callable = prepare) -> None:
    """Fit the text tokenizer where its file is missing, then `make` (as `prepare`) every source that is missing.

    What exists is left as it is; whether it fits this config is for `PreparedSources.check` to say. Raises ConfigError
    before anything is made where a source cannot be prepared, since nothing says from what.
    """
    missing = {name: source for name, source in sources.items() if is_missing(source.shards)}
    unfitted = (
        text.path if text.path is not None and text.vocabulary_size is not None and is_missing(text.path) else None
    )
    for name, source in missing.items():
        _check_input(name, source, f"data.sources.{name}.shards", source.shards)
    for name, source in sources.items() if unfitted is not None else ():
        _check_input(name, source, "tokenizers.text.path", str(unfitted))
    if unfitted is not None and text.vocabulary_size is not None:
        logger.info(f"{unfitted} does not exist: fitting it to training texts of {', '.join(sources)}")
        texts = chain.from_iterable(
            islice(training_texts(s.kind, s.input or NO_INPUT, s.options), FIT_TEXTS) for s in sources.values()
        )
        file = Path(local_path(unfitted) or unfitted)
        file.parent.mkdir(parents=True, exist_ok=True)
        TextTokenizer.train(texts, text.vocabulary_size).save(file)
    for name, source in missing.items():
        origin = f"{source.kind} in {source.input}" if source.input is not None else source.kind
        logger.info(f"{source.shards} does not exist: preparing source {name} there, from {origin}")
        with _options_named(f"data.sources.{name}.options"):
            make(
                source.kind,
                source.input or NO_INPUT,
                local_path(source.shards),
                text_tokenizer=text.build(DEFAULT_STORAGE.read),
                workers=None,  # as many as the work is worth
                options=source.options,
            )


@contextmanager
def _options_named(key: str) -> Iterator[None]:
    """Errors name an option as `mmoe prepare` takes it: put before it the `key` that a config has it under."""
    try:
        yield
    except MmoeError as error:
        error.args = tuple(_OPTION.sub(f"{key}.", said) if isinstance(said, str) else said for said in error.args)
        raise


def _check_input(name: str, source: SourceConfig, key: str, missing: str) -> None:
    """Raises ConfigError where there is nothing to make `missing`, the value of `key`, from."""
    if SOURCES.find(source.kind).generated:
        return
    said = f"{key}: {missing} does not exist{said_nearest(missing)}"
    if source.input is None:
        raise ConfigError(
            f"{said}; correct it, or give the {source.kind} recordings to make it from in data.sources.{name}.input"
        )
    if not os.path.exists(source.input):  # noqa: PTH110  # false, not an error, where it may not be looked at
        raise ConfigError(
            f"{said}, and it cannot be made: data.sources.{name}.input, {shlex.quote(source.input)}, does not exist "
            f"either{said_nearest(source.input)}; correct one of the two"
        )
