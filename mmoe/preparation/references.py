"""Signs the samples of sources that are prepared already, so that another source does not repeat them."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmoe.addresses import join_address
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_stored
from mmoe.data.storage.store import DEFAULT_STORAGE
from mmoe.errors import DataError
from mmoe.files import write_atomically
from mmoe.preparation.signatures import DedupConfig, SignatureBuilder, Signatures
from mmoe.schema.manifest import SPLITS, SourceManifest
from mmoe.schema.modality import Modality
from mmoe.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class Reference:
    """Names a shard of another source's `side`, whose samples are not to occur again."""

    number: int
    source: str
    side: str
    shard: str  # relative to the source

    @property
    def name(self) -> str:
        """The name, without suffix, of the files that hold the shard's signatures."""
        return f"reference-{self.number:06d}"


@dataclass(frozen=True)
class ReferenceSigner:
    """Writes a shard's signatures as ``<name>.npz`` and ``<name>.json`` in `folder`; returns its number of samples.

    It is picklable: the work of an engine.
    """

    folder: Path
    config: DedupConfig
    tokenizer: TextTokenizer

    def __call__(self, reference: Reference) -> int:
        """Write the signatures of a shard, and return the number of its samples."""
        index = ShardIndex.read(join_address(reference.source, reference.shard))
        contents = index.content_hashes.tolist()
        builder = SignatureBuilder(self.config)
        for row, content in enumerate(contents):
            numbers = {index.row_member(row, number)[0]: number for number in range(index.row_members(row))}

            def read(name: str, row: int = row, numbers: dict[str, int] = numbers) -> bytes:
                return read_stored(index, row, numbers[name]).content

            def texts(row: int = row) -> list[str]:
                return _texts(index, row, self.tokenizer)

            builder.add(row, content, index.row_segments(row), list(numbers), texts, read)
        labels = [[f"{reference.source}: {key}" for key in index.keys], index.recordings]
        write_atomically(self.folder / f"{reference.name}.json", json.dumps(labels))
        content = io.BytesIO()
        np.savez(content, **builder.build().arrays())  # type: ignore[arg-type]  # numpy's stubs: as its flag
        write_atomically(self.folder / f"{reference.name}.npz", content.getvalue())  # last: it says that both are there
        return len(contents)


def find_references(config: DedupConfig, tokenizer: TextTokenizer) -> list[Reference]:
    """List every shard of the sources to compare with.

    Raises DataError for a source whose texts cannot be compared.
    """
    found: list[Reference] = []
    for source in config.against:
        manifest = SourceManifest.load(source, DEFAULT_STORAGE.read)
        if config.near and manifest.text_fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{source} was prepared with another text tokenizer, so its texts cannot be compared for near "
                "duplicates; prepare both with the same one"
            )
        for side in filter(manifest.splits.get, SPLITS):
            found += [
                Reference(number, source, side, shard.path)
                for number, shard in enumerate(manifest.splits[side].shards, start=len(found))
            ]
    return found


def load_signatures(folder: Path, reference: Reference) -> tuple[Signatures, Sequence[str], Sequence[str]]:
    """Read what `ReferenceSigner` wrote of a shard: the signatures, what messages call a sample, and its recording."""
    labels, recordings = json.loads((folder / f"{reference.name}.json").read_text(encoding="ascii"))
    with np.load(folder / f"{reference.name}.npz", allow_pickle=False) as arrays:
        return Signatures(**arrays), labels, [f"{reference.source}: {name}" for name in recordings]


def is_signed(folder: Path, reference: Reference) -> bool:
    """Tell whether `ReferenceSigner` has finished this shard."""
    return (folder / f"{reference.name}.npz").is_file()


def _texts(index: ShardIndex, row: int, tokenizer: TextTokenizer) -> list[str]:
    segments, ids = index.row_segments(row), index.row_text(row)
    ranges = segments[segments["modality"] == Modality.TEXT]
    return [tokenizer.decode(ids[start:stop]) for start, stop in zip(ranges["start"].tolist(), ranges["stop"].tolist())]
