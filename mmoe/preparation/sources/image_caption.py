"""Reads images with captions: a folder with ``captions.jsonl``, rows ``{"image": path, "caption": text, ...}``.

What may stand in the place of that file, `mmoe.preparation.sources.folders` says: Hugging Face's ``metadata.csv`` with
``file_name`` and ``text`` (or ``caption``), a ``.txt`` beside each image, or tables that hold the images themselves.
The input may also be one table.

A sample is one image and one caption, its two sides a contrastive pair; a list of captions gives a sample each. An
image is a recording, so all its captions fall on one side of the split: rows of one path, also where the image stands
in the table beside its path. An image in a table without a path is a recording of its row. Files of the folder that
no row names are refused, so that they are counted.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmoe.config.base import Config
from mmoe.data.load.media import IMAGE_SUFFIXES
from mmoe.preparation.sources import files, folders, jsonl, tables
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.captioned import captioned
from mmoe.preparation.sources.media_bytes import read_media
from mmoe.schema.sample import Sample

_FORM = folders.RowForm(
    "captions.jsonl", "image", ("caption", "text"), IMAGE_SUFFIXES, ("columns.image", "columns.caption")
)


class ImageCaptionColumns(Config):
    """Says which columns of a row are the image (a path, or its bytes) and its captions."""

    image: str | None = None  # null: image, or in a table of others file_name
    caption: str | tuple[str, ...] | None = None  # of several, those after the first may be absent; null: caption, text


class ImageCaptionConfig(Config):
    """Says how images and their captions are found."""

    columns: ImageCaptionColumns = ImageCaptionColumns()


def items(path: Path, config: ImageCaptionConfig, quarantine: Refuse) -> Iterator[Item]:
    """List one item per image and caption; the second column's captions have keys ending in ``-1``, and so on."""
    given = config.columns.caption
    captions = (given,) if isinstance(given, str) else given
    form = _FORM.asked(config.columns.image, captions)
    if path.is_file():
        root, found, described = path.parent, [], folders.describe_table(path, form, quarantine)
    else:
        root, found = path, files.listing(path, quarantine)
        described = folders.find_description(root, found, form, quarantine)
    keys = folders.DescribedKeys(root, described)
    for where, row_key, row in described.rows:
        try:
            first, recording = keys.described(where, row_key, row, _FORM.field)
        except Refused as refusal:
            quarantine(where, refusal)
            continue
        columns = captions or (jsonl.chosen(row, _FORM.texts),)
        for place, (number, column, said) in enumerate(_captions(row, columns)):
            key = keys.free(f"{first}-{number}" if number else first) if place else first
            spoken = {**row, column: said} if said is not row.get(column) else row
            yield Item(key, recording, partial(_sample, root, where, spoken, column, key, recording))
    unnamed = (file for file in found if file not in keys.named)
    files.pass_over(unnamed, path, "captions.jsonl (or another table of captions) and the images in it", quarantine)


def suggest(path: Path) -> dict[str, Any]:
    """Name the column with the longest text of the first table, where none has the name of a caption."""
    found = [path] if path.is_file() else files.listing(path, lambda key, refusal: None)
    column = tables.suggest_text(found, _FORM.texts, ("image", "file_name"))
    return {} if column is None else {"columns": {"caption": column}}


def _captions(row: dict[str, Any], columns: tuple[str, ...]) -> Iterator[tuple[int, str, Any]]:
    """The captions of a row with the number and the name of their column, which may hold a list of them."""
    for number, column in enumerate(columns):
        said = row.get(column)
        if number == 0 or said is not None:
            yield from ((number, column, each) for each in (said if isinstance(said, list) and said else [said]))


def _sample(root: Path, where: str, row: dict[str, Any], column: str, key: str, recording: str) -> Sample:
    caption, image = jsonl.text_of(row, column, where), read_media(row["image"], root, where)
    return captioned(key, recording, image.content, image.suffix, image.name, caption, where)


SOURCE = Source(
    kind="image_caption", clock="none", skew_budget_ns=0, config=ImageCaptionConfig, items=items, suggest=suggest
)
