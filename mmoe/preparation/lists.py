"""Writes the lists of what is not in a prepared source and why, and says so where a split has no sample."""

from pathlib import Path

from mmoe.errors import DataError
from mmoe.preparation.chunks import Chunk, StoredChunk
from mmoe.preparation.source_report import ItemLog, SplitReport
from mmoe.preparation.splits import Holdout

QUARANTINE = "quarantine.jsonl"  # what could not be read
REMOVED = "removed.jsonl"  # what could be read and was left out
SPLIT_GAP = "gap before the held-out tail"  # the reason of what the split leaves out

# (item, reason, message, key of what it duplicates or "") of samples left out of a chunk
Removed = list[tuple[int, str, str, str]]
# (key, reason, message) of what is refused before or beside the chunks
Refusals = list[tuple[str, str, str]]


def write_lists(
    folder: Path, listed: Refusals, folders: dict[Chunk, Path], removed: dict[str, Removed]
) -> tuple[ItemLog, ItemLog]:
    """Write the lists of what is not in the shards; return that of what was refused, and that of what was removed."""
    with ItemLog(folder / QUARANTINE) as refused, ItemLog(folder / REMOVED) as left_out:
        for line in listed:
            refused.write(*line)
        for chunk, place in folders.items():
            stored = StoredChunk(place)
            for number, reason, message in stored.refused:
                refused.write(chunk.items[number].key, reason, message)
            lines = [(*line, "") for line in stored.removed] + removed.get(chunk.name, [])
            for number, reason, message, of in sorted(lines):
                left_out.write(chunk.items[number].key, reason, message, **({"duplicate_of": of} if of else {}))
    return refused, left_out


def unfilled(
    reports: dict[str, SplitReport],
    holdout: Holdout,
    refused: ItemLog,
    left_out: ItemLog,
    input: str | Path,
    output: Path,
) -> DataError | None:
    """Return the error to raise where a split has no sample, or None where each has one.

    The error names the commonest reason, and where the lists will be.
    """
    taken = {name: report.samples for name, report in reports.items()}
    wanted = [name for name, no in (("train", holdout.everything), ("heldout", holdout.nothing)) if not no]
    empty = next((name for name in wanted if not taken[name]), None)
    if empty is None:
        return None
    counts, examples = refused.counts + left_out.counts, left_out.examples | refused.examples
    if not counts:
        more = ", or set prepare.heldout_share=0" if empty == "heldout" and holdout.listed is None else ""
        return DataError(f"{input} gives no sample for the split {empty}; add recordings{more}")
    # The gap follows from the split: whoever has nothing left wants to know what became of the rest.
    named = {reason: count for reason, count in counts.items() if reason != SPLIT_GAP} or counts
    reason = max(named, key=named.__getitem__)
    lists = [str(beside(output, n)) for log, n in ((refused, QUARANTINE), (left_out, REMOVED)) if log.counts]
    return DataError(
        f"{input} leaves no sample for the split {empty}: {counts.total()} were refused or removed, "
        f"{sum(taken.values())} taken; repair or add recordings. The commonest reason is {reason!r} ({named[reason]}), "
        f"as here: {examples[reason]}. All are in {' and '.join(lists)}"
    )


def with_list(error: DataError, listed: Refusals, output: Path) -> DataError:
    """Return an error that ended the listing, with what had been refused until then written beside the output."""
    if not listed:
        return error
    place = beside(output, QUARANTINE)
    place.parent.mkdir(parents=True, exist_ok=True)
    with ItemLog(place) as log:
        for line in listed:
            log.write(*line)
    reason, count = log.counts.most_common(1)[0]
    return DataError(
        f"{error}. {len(listed)} items were refused before that, {count} for the reason {reason!r}, as here: "
        f"{log.examples[reason]}. All are in {place}"
    )


def beside(output: Path, name: str) -> Path:
    """Return the path where a list stays when there is no output."""
    return output.with_name(f"{output.name}.{name}")


def keep_lists(folder: Path, output: Path, refused: ItemLog, left_out: ItemLog) -> None:
    """Move the lists that are not empty from the folder of an output that is not to be to where `unfilled` says."""
    for log, name in ((refused, QUARANTINE), (left_out, REMOVED)):
        if log.counts:
            (folder / name).replace(beside(output, name))


def refusals(folders: dict[Chunk, Path]) -> Refusals:
    """Collect what was refused while the chunks were made."""
    return [
        (chunk.items[number].key, reason, message)
        for chunk, place in folders.items()
        for number, reason, message in StoredChunk(place).refused
    ]
