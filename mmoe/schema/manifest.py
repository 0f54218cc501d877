"""Defines the source manifest: what is known of a prepared source without opening a shard.

A prepared source is a folder::

    source.json                     SourceManifest
    train/shard-000000.tar          WebDataset shard
    train/shard-000000.parquet      its index: one row a sample (`mmoe.data.index.shard_index`)
    heldout/...                     the same for the held-out recordings
    quarantine.jsonl                what was refused at preparation, with the reason
    removed.jsonl                   what can be read and was left out: filtered, or a duplicate
"""

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mmoe.addresses import join_address, local_path
from mmoe.config.base import Config
from mmoe.errors import DataError, brief
from mmoe.files import Read, read_file, write_atomically
from mmoe.schema.modality import check_known
from mmoe.schema.rig import STANDARD, Rig
from mmoe.schema.vectors import VectorStats

MOST = 1 << 50  # of anything that is counted


class SegmentGroup(Config):
    """Counts segments alike in all that decides their positions but length; `span` is their total stop - start."""

    modality: str
    sliced: bool  # they stand in time slices
    camera: bool  # they are images of a known camera
    height: int = Field(ge=0, le=MOST)
    width: int = Field(ge=0, le=MOST)
    rate: int = Field(ge=0, le=MOST)
    count: int = Field(ge=0, le=MOST)
    span: int = Field(ge=0, le=MOST)


FORMAT = 3  # 2 had neither checksums of members nor the proof that decord may read them


MANIFEST = "source.json"


SPLITS = ("train", "heldout")


VECTORS = ("ACTION", "STATE", "INERTIAL")  # modalities whose payloads are rows of numbers


_MOST_ROWS = 10_000_000  # of a shard: an epoch is shuffled a block of shards at a time


class ShardEntry(Config):
    """Names one shard of a split: its tar, how much it holds, and the digest of its index."""

    path: str  # of the tar, relative to the source folder; the index has the same stem
    rows: int = Field(ge=0, le=_MOST_ROWS)
    bytes: int = Field(ge=0, le=MOST)
    digest: str  # of all that its index says, the checksums of every member among it

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if not path or path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise ValueError(f"{brief(path)} is no path inside the source's folder")
        return path


class SplitEntry(Config):
    """Says what one split of a source holds: its shards, and its segments by group."""

    samples: int = Field(ge=0, le=MOST)
    recordings: int = Field(ge=0, le=MOST)
    shards: tuple[ShardEntry, ...]
    clips: int = Field(ge=0, le=MOST)  # samples made of time slices
    slices: int = Field(ge=0, le=MOST)
    groups: tuple[SegmentGroup, ...]
    # "<stream>: <what>" -> members of slices; see `mmoe.preparation.slices`
    flagged: dict[str, int] = Field(default_factory=dict)

    def segments(self, modality: str) -> int:
        """Count the segments of the modality of this name."""
        return sum(group.count for group in self.groups if group.modality == modality)


class _Format(BaseModel):
    """What every version of a manifest holds."""

    format: int


class SourceManifest(Config):
    """Holds `source.json`: all that planning and model building need to know of a prepared source."""

    format: int
    kind: str
    text_fingerprint: str  # of the text tokenizer whose ids stand in the index
    clock: str  # "captured", "synthetic" (times made by a writer) or "none"
    skew_budget_ns: int  # |offset_ns| that captured members may have; 0 without a clock
    rig: Rig = STANDARD  # whose numbers are the cameras of segments
    vectors: dict[str, VectorStats]  # by modality name: "ACTION", "STATE", "INERTIAL"
    # By dimension of actions whose numbers 0, 1, ... have names: how many rows that are trained on have each, about.
    categories: dict[str, dict[str, int]] = Field(default_factory=dict)
    splits: dict[str, SplitEntry]
    quarantined: dict[str, int]  # reason -> samples refused
    removed: dict[str, int] = Field(default_factory=dict)  # reason -> readable samples left out: filters, duplicates

    @property
    def holds_out(self) -> bool:
        """Say whether some of the source's samples are held out."""
        return "heldout" in self.splits and self.splits["heldout"].samples > 0

    @field_validator("splits")
    @classmethod
    def _known(cls, splits: dict[str, SplitEntry]) -> dict[str, SplitEntry]:
        if "train" not in splits or not set(splits) <= set(SPLITS):
            raise ValueError(f"it has {brief(', '.join(splits) or 'none')}, where train and perhaps heldout belong")
        return splits

    @model_validator(mode="after")
    def _scaled(self) -> "SourceManifest":
        present = {group.modality for split in self.splits.values() for group in split.groups}
        if lacking := sorted((present & set(VECTORS)) - self.vectors.keys()):
            raise ValueError(f"vectors has no statistics of {lacking[0]}, of which there are segments")
        return self

    @model_validator(mode="after")
    def _of_actions(self) -> "SourceManifest":
        names = self.vectors["ACTION"].names if "ACTION" in self.vectors else ()
        if lacking := [name for name in self.categories if name not in names]:
            raise ValueError(f"categories has {lacking[0]}, which is no dimension of the actions")
        return self

    @classmethod
    def load(cls, folder: str | Path, read: Read = read_file) -> "SourceManifest":
        """Read and check the manifest of a prepared source, near or (by a `read` that can) far.

        Raises DataError for one that is missing, damaged or of another format.
        """
        path = join_address(folder, MANIFEST)
        if (local := local_path(path)) and not Path(local).is_file():
            raise DataError(f"{path} does not exist: {folder} is not a prepared source; run `mmoe prepare` to write it")
        content = read(path, "the source")
        try:
            found = _Format.model_validate_json(content).format
            if found != FORMAT:
                raise DataError(f"{path} has format {found}, this version reads {FORMAT}; prepare it again")
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            fault = error.errors()[0]
            key = brief(".".join(map(str, fault["loc"])) or "all of it", quoted=False)
            said = fault["msg"].removeprefix("Value error, ")
            raise DataError(
                f"{path} is not a source manifest ({key}: {said}); copy it again or prepare the source again"
            ) from error

        check_known((group.modality for split in manifest.splits.values() for group in split.groups), path)
        return manifest

    def save(self, folder: str | Path) -> None:
        """Write the manifest into `folder`."""
        write_atomically(Path(folder) / MANIFEST, self.model_dump_json(indent=1))
