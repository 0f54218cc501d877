"""Reads images with captions: a folder with ``captions.jsonl``, rows ``{"image": path, "caption": text, ...}``.

What may stand in the place of that file, `mmoe.preparation.sources.folders` says: Hugging Face's ``metadata.csv`` with
``file_name`` and ``text`` (or ``caption``), or a ``.txt`` beside each image.

A sample is one image and one caption, its two sides a contrastive pair. An image is a recording, so all its
captions fall on one side of the split. Files of the folder that no row names are refused, so that they are counted.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from mmoe.config.base import Config
from mmoe.preparation.sources import files, folders, jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.captioned import captioned
from mmoe.schema.sample import Sample

_FORM = folders.RowForm(
    "captions.jsonl", "image", ("caption", "text"), (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
)


class ImageCaptionConfig(Config):
    """Says which fields of a row are the captions of its image."""

    captions: tuple[str, ...] = Field(("caption",), min_length=1)  # fields of a row; null or absent after the first


def items(path: Path, config: ImageCaptionConfig, quarantine: Refuse) -> Iterator[Item]:
    """List one item per image and caption; the second field's captions have keys ending in ``-1``, and so on."""
    found, keys = files.listing(path, quarantine), files.FileKeys()
    described = folders.find_description(path, found, _FORM, quarantine)
    named = set(described.tables)
    for where, row in described.rows:
        try:
            name = jsonl.name_of(row, "image", where)
        except Refused as refusal:
            quarantine(where, refusal)
            continue
        named.add(path / name)
        first, image = keys.key(name)
        for number, field in enumerate(config.captions):
            if number and row.get(field) is None:
                continue
            key = keys.free(f"{first}-{number}") if number else first
            yield Item(key, image, partial(_sample, path, where, row, field, key, image))
    unnamed = (file for file in found if file not in named)
    files.pass_over(unnamed, path, "captions.jsonl (or another table of captions) and the images in it", quarantine)


def suggest(path: Path) -> dict[str, Any]:
    """Name the column with the longest text in the first row, where none has the name of a caption."""
    rows = folders.find_description(path, files.listing(path, _unheard), _FORM, _unheard).rows
    row = next((row for _, row in rows), {})
    texts = {
        name: value for name, value in row.items() if name not in ("image", "file_name") and isinstance(value, str)
    }
    default = ImageCaptionConfig.model_fields["captions"].default
    return {} if not texts or default[0] in texts else {"captions": [max(texts, key=lambda name: len(texts[name]))]}


def _unheard(key: str, why: Refused) -> None:
    """What is refused is told when the recordings are listed."""


def _sample(path: Path, where: str, row: dict[str, Any], field: str, key: str, recording: str) -> Sample:
    caption, image = jsonl.text_of(row, field, where), jsonl.read_named(path, row, "image", where)
    file = path / row["image"]
    return captioned(key, recording, image, file.suffix, str(file), caption, where)


SOURCE = Source(
    kind="image_caption", clock="none", skew_budget_ns=0, config=ImageCaptionConfig, items=items, suggest=suggest
)
