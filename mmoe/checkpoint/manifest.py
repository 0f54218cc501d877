"""Reads and writes `manifest.json`, which says what a checkpoint is made of and whether it still is."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.checkpoint.files import DamagedError
from mmoe.errors import CheckpointError

MANIFEST = "manifest.json"
# Formats 1 to 3 are still read. 1 numbered the optimizer's states: only names mean the same in every layout. 2 had a
# file `latest` beside the checkpoints that named the newest, no config.yaml, and no checksum of the manifest itself. 3
# had other names of parameters (`mmoe.checkpoint.upgrade`).
FORMAT = 4


@dataclass(frozen=True)
class Manifest:
    """Holds the format of a checkpoint, its step, and of every other file (size in bytes, CRC-32) by name."""

    format: int
    step: int
    files: dict[str, tuple[int, int]]

    def to_json(self) -> str:
        """Return the text of ``manifest.json``, which holds a checksum of itself."""
        files = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in self.files.items()}
        content = {"format": self.format, "step": self.step, "files": files}
        return json.dumps(content | {"crc32": _crc32(content)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of the checkpoint in `folder`.

        Raises DamagedError where it is not as it was written, and CheckpointError for another format.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, step = content["format"], content["step"]
            if version > 2 and content.pop("crc32", None) != _crc32(content):
                raise ValueError("its contents are not what was written")
            if f"step-{step:08d}" != folder.name.partition(".")[0]:
                raise ValueError(f"it is of step {step}")
            files = {name: (file["bytes"], file["crc32"]) for name, file in content["files"].items()}
            if odd := [name for name in files if "/" in name or name in ("", ".", "..")]:
                raise ValueError(f"it names {odd[0]!r}")
            if not all(type(number) is int for sums in files.values() for number in sums):
                raise ValueError("its sizes are no numbers")
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing from its checkpoint") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{path} is corrupt ({error})") from error
        if version not in range(1, FORMAT + 1):
            raise CheckpointError(
                f"{path} has format {version!r}, this mmoe reads 1 to {FORMAT}; load it with the version that wrote it"
            )
        return cls(version, step, files)


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
