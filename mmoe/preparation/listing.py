"""Lists what there is to prepare: the items of a source that may be made, and which side of the split each is on."""

from pathlib import Path

from mmoe.config.base import Config
from mmoe.data.load.reading import reading
from mmoe.errors import DataError, brief
from mmoe.preparation.lists import SPLIT_GAP, Refusals
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.files import check_name
from mmoe.preparation.splits import GAP_NS, Holdout, Split


def check_named(input: str | Path) -> None:
    """Raise DataError for an empty input, which `Path` would take for the current folder."""
    if not str(input).strip():
        raise DataError("the input is empty, which names no folder; give the file or folder of the recordings")


def list_items(source: Source, input: Path, reader: Config, quarantine: Refuse) -> list[Item]:
    """List the items that may be made; those whose key or recording cannot be one are refused."""
    if not source.generated and not input.exists():
        raise DataError(f"{input} does not exist; give the file or folder of the recordings to prepare")
    items: dict[str, Item] = {}
    with reading(f"source of kind {source.kind}", str(input), "repair what describes its recordings"):
        for item in source.items(input, reader, quarantine):
            try:
                check_name(item.key, str(input))
                check_name(item.recording, str(input))
                if item.key in items:
                    message = f"sample key {item.key} occurs twice in {input}; give every recording its own name"
                    raise Refused("duplicate key", message)
            except Refused as refusal:
                quarantine(item.key, refusal)
            else:
                items[item.key] = item
    return list(items.values())


def split_items(source: Source, items: list[Item], lost: Refusals, holdout: Holdout) -> tuple[Split, Refusals]:
    """Split the items that are not `lost` by side; also return the refusals of those in the gap between the sides."""
    gone = {key for key, *_ in lost}
    left = [item for item in items if item.key not in gone]
    sides = holdout.split(left, gap=0 if source.clock == "none" else GAP_NS)
    said = "sample {} lies in the gap before the held-out tail of {}"
    return sides, [(item.key, SPLIT_GAP, said.format(item.key, item.recording)) for item in sides.gap]


def check_listed(holdout: Holdout, items: list[Item], listed: Path, input: Path) -> list[str]:
    """Return in a sentence what the file `listed` names and no item has. Raises DataError where it names none."""
    if holdout.listed is None:
        return []
    strange = sorted(holdout.listed.difference(*({item.key, item.recording} for item in items)))
    some = ", ".join(brief(name, 60, quoted=False) for name in strange[:5]) + (", ..." if len(strange) > 5 else "")
    if len(strange) == len(holdout.listed):
        raise DataError(
            f"{listed}: none of its {len(strange)} lines is the key or the recording of a sample in {input} ({some}); "
            "give one key or recording a line, as `mmoe inspect` and the reader name them"
        )
    if not strange:
        return []
    return [f"{listed}: {len(strange):,} of its {len(holdout.listed):,} names are of no sample in {input}: {some}"]


def read_listed(path: Path) -> frozenset[str]:
    """Read a list of keys or recordings, one a line. Raises DataError where it cannot be read or names nothing."""
    with reading("list of what is held out", str(path), "give a text file with one key or recording a line"):
        names = frozenset(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()) - {""}
    if not names:
        raise DataError(f"{path} names nothing to hold out; give one key or recording a line")
    return names


def can_split(source: Source, items: list[Item], lost: Refusals, holdout: Holdout) -> bool:
    """Tell whether both sides of the split keep an item once those that are `lost` are gone."""
    try:
        sides, _ = split_items(source, items, lost, holdout)
    except DataError:
        return False
    return bool(sides.heldout and sides.train)
