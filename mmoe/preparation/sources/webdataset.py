"""Reads images with captions in WebDataset tars: members ``<key>.<field>``, adjacent for one sample.

A key ends at the first dot of a name's last path component; the rest, lower-cased, is the field. A sample is the one
image (by the suffix: `IMAGE_SUFFIXES`) and the text of a key: the ``.txt`` where there is one, else the string that the
``.json`` has under `columns.caption`. Other members are not read. An image is a recording of its own. Tars may
number their samples alike: keys begin with the tar's path, in which dots become underscores.

Only headers are read to list a tar; a sample is then three range reads at most. So tars must not be compressed, and
a URL that would run a command (``pipe:``) is no path and is not understood. Samples that WebDataset's rule for keys
would merge or tear apart are refused with the reason, not mended.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mmoe.config.base import Config
from mmoe.data.index.shards import read_member
from mmoe.data.load.media import IMAGE_SUFFIXES
from mmoe.data.load.reading import reading
from mmoe.errors import DataError
from mmoe.preparation.sources import files, jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.captioned import captioned
from mmoe.schema.bounds import bounds
from mmoe.schema.sample import Sample

_IMAGES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)

_REMEDY = "copy it again, or unpack it where it is compressed"
_GLOB = re.compile(r"(\*\*/|\*|\?|\[[^\]]+\])")
_META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset keeps for itself


class WebDatasetColumns(Config):
    """Says which field of a ``.json`` member is the caption."""

    caption: str = "caption"  # the field that holds the text


class WebDatasetConfig(Config):
    """Says which tars of a folder are read, and where captions stand."""

    tars: str = "**/*.tar"  # which files of a folder, as a glob
    columns: WebDatasetColumns = WebDatasetColumns()


@dataclass
class _Group:
    """A run of adjacent members of one key: byte offset and size by field; `repeated` fields occur more than once."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)


def items(path: Path, config: WebDatasetConfig, quarantine: Refuse) -> Iterator[Item]:
    """List one item per sample of the tar at `path`, or of the folder's tars in order of their names."""
    found = [path] if path.is_file() else files.listing(path, quarantine)
    tars = {file: None for file in found if file == path or _matches(file.relative_to(path), config.tars)}
    others = (file for file in found if file not in tars and file.suffix.lower() != ".tar")
    files.pass_over(others, path, "tars that are not compressed", quarantine)
    if not tars:
        raise DataError(f"{path} holds no file {config.tars}; give a tar, or its folder and the option tars=<glob>")
    root = path.parent if path.is_file() else path
    for tar in tars:
        name = tar.relative_to(root).with_suffix("").as_posix().replace(".", "_")
        try:
            files.check_name(name, str(root))
        except Refused as refusal:
            quarantine(name, refusal)
            continue
        yield from _tar_items(tar, name, config, quarantine)


def _matches(file: Path, pattern: str) -> bool:
    """Whether a path below the folder matches a glob, in which ``**/`` stands for any folders; case does not count."""
    wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(wild.get(part) or _class(part) or re.escape(part) for part in _GLOB.split(pattern))
    return re.fullmatch(expression, file.as_posix(), re.IGNORECASE) is not None


def _class(part: str) -> str:
    """A regular expression for ``[...]`` of a glob; empty for anything else."""
    return f"[{part[1:-1].replace('!', '^', 1)}]" if part.startswith("[") and part.endswith("]") else ""


def _tar_items(tar: Path, name: str, config: WebDatasetConfig, quarantine: Refuse) -> Iterator[Item]:
    groups: dict[str, list[_Group]] = {}
    for group in _groups(tar, name, quarantine):
        groups.setdefault(group.key, []).append(group)
    for key, found in groups.items():
        full = f"{name}/{key.replace('.', '_')}"
        try:
            files.check_name(full, str(tar))
            _check_whole(found, tar)
            image, text = _image_and_text(found[0], tar)
        except Refused as refusal:
            quarantine(full, refusal)
            continue
        chosen = {name: found[0].members[name] for name in (image, text)}
        yield Item(full, full, partial(_sample, tar, full, chosen, config.columns.caption))


def _groups(tar: Path, name: str, quarantine: Refuse) -> Iterator[_Group]:
    """The runs of members of one key, in the order of the tar. What follows a fault in the tar is refused."""
    group, size = None, 0
    try:
        with (
            reading("tar", str(tar), _REMEDY),
            files.open_regular(tar) as raw,
            tarfile.open(None, "r:", raw) as file,
        ):
            size = tar.stat().st_size
            for info in file:
                file.members = []  # type: ignore[attr-defined]  # not in the stubs; it would keep every header
                if info.isdir() or _META.match(info.name):
                    continue
                if fault := _fault(info, size):
                    quarantine(f"{name}/{info.name}", Refused("unusable tar member", f"{tar}: {info.name!r} {fault}"))
                    continue
                folder, slash, base = info.name.rpartition("/")
                stem, dot, member = base.partition(".")
                if not stem or not dot:
                    message = f"{tar}: member {info.name!r} has no key and field; name it <key>.<field>"
                    quarantine(f"{name}/{info.name}", Refused("member without key and field", message))
                    continue
                key, member = folder + slash + stem, member.lower()
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key)
                if member in group.members:
                    group.repeated.append(member)
                group.members.setdefault(member, (info.offset_data, info.size))
            file.fileobj.seek(file.offset)
            if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end mark at byte {file.offset}")  # tarfile just stops there
    except DataError as error:
        # The last sample may have lost members, so it goes with what follows.
        quarantine(name, Refused("unreadable tar", str(error)))
        return
    if group is not None:
        yield group


def _fault(info: tarfile.TarInfo, size: int) -> str | None:
    """Why a member of a tar of so many bytes is not read; None where it is."""
    if info.issparse():
        return "is sparse: its bytes do not stand in the tar as they are; pack it again without --sparse"
    if not info.isreg():
        return "is a link or a device, not a file; pack the file itself (tar --dereference --hard-dereference)"
    if info.size < 0 or info.offset_data + info.size > size:
        return f"states {info.size} bytes, more than the tar has left; copy the tar again"
    if info.size > bounds().file_bytes:
        return f"has {info.size} bytes, the bound file_bytes is {bounds().file_bytes}; raise prepare.bounds.file_bytes"
    return None


def _check_whole(groups: list[_Group], tar: Path) -> None:
    """Raise Refused unless the key has one run of members, each once."""
    key, first, fields = groups[0].key, set(groups[0].members), [set(group.members) for group in groups]
    if groups[0].repeated or any(first & other for other in fields[1:]):
        message = f"{tar}: sample {key} occurs more than once (its {', '.join(sorted(first))}); give each its own key"
        raise Refused("duplicate key", message)
    if len(groups) > 1:
        message = (
            f"{tar}: the members of {key} ({', '.join(sorted(set.union(*fields)))}) are not adjacent, so readers see "
            f"{len(groups)} samples; write the tar in sorted order (tar --sort=name)"
        )
        raise Refused("sample torn apart in the tar", message)


def _image_and_text(group: _Group, tar: Path) -> tuple[str, str]:
    """The fields of the only image and the only text."""
    images = [name for name in group.members if name.rpartition(".")[2] in _IMAGES]
    texts = [name for name in group.members if name.rpartition(".")[2] == "txt"]
    texts = texts or [name for name in group.members if name.rpartition(".")[2] == "json"]
    if len(images) > 1 or len(texts) > 1:
        message = (
            f"{tar}: key {group.key} has several images or texts ({', '.join(sorted(images + texts))}): a key ends "
            "at its first dot, so a dot in the names merges samples; rename them without it"
        )
        raise Refused("samples merged by a dot in the key", message)
    for what, found, suffixes in (("image", images, _IMAGES), ("text", texts, ("txt", "json"))):
        if not found:
            message = f"{tar}: sample {group.key} has no member .{' .'.join(suffixes)}; add it or leave the sample out"
            raise Refused(f"sample without {what}", message)
    return images[0], texts[0]


def _sample(tar: Path, key: str, members: dict[str, tuple[int, int]], caption: str) -> Sample:
    (image, data), (text, said) = ((name, read_member(tar, *at)) for name, at in members.items())
    where = f"{tar}: {key}.{text}"
    if text.endswith("json"):
        words = jsonl.text_of(jsonl.parse_row(said, where, 0, where), caption, where)
    elif not (words := jsonl.decode_text(said, where, 0)).strip():
        raise Refused("empty text", f"{where} is blank; give it a text or leave the sample out")
    suffix = f".{image.rpartition('.')[2]}"
    return captioned(key, key, data, suffix, f"{tar}: {key}.{image}", words, where)


SOURCE = Source(kind="webdataset", clock="none", skew_budget_ns=0, config=WebDatasetConfig, items=items)
