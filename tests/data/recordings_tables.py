"""Tables as their owners' libraries lay them out: CSV, parquet of the Hub, folders of `datasets.save_to_disk`."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # of the features Image and Audio


def hub_table(columns: dict[str, list], **media: str) -> pa.Table:
    """A table with the features in its schema as `datasets` writes them; `media` names columns "Image" or "Audio"."""
    arrays = {name: pa.array(values, MEDIA if name in media else None) for name, values in columns.items()}
    features = {
        name: {"_type": media[name]} if name in media else {"dtype": "string", "_type": "Value"} for name in columns
    }
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(arrays).replace_schema_metadata(said)


def write_stream(path: Path, table: pa.Table, rows: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def save_to_disk(folder: Path, table: pa.Table, shards: int = 2, split: str | None = None) -> None:
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        first, last = (len(table) * (number + more) // shards for more in (0, 1))
        write_stream(folder / name, table.slice(first, last - first))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    info = {"citation": "", "description": "", "features": {}, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def save_splits(folder: Path, splits: dict[str, pa.Table]) -> None:
    for name, table in splits.items():
        save_to_disk(folder / name, table, split=name)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def write_table(path: Path, columns: dict[str, list]) -> None:
    """The columns as the name of the file says: .json, .jsonl, .csv, .tsv (with .gz too), .parquet, .arrow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=3)
    elif kind == "stream.arrow":
        write_stream(path, pa.table(columns))
    elif kind == "file.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.table(columns).schema) as writer:
            writer.write_table(pa.table(columns), max_chunksize=3)
    else:
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        with (gzip.open if kind.endswith("gz") else open)(path, "wt", newline="", encoding="utf-8") as file:
            if kind == "json":
                json.dump(rows, file, indent=1)
            elif kind.startswith("jsonl"):
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            elif kind.startswith("tsv"):
                file.writelines("\t".join(row) + "\n" for row in (columns, *zip(*columns.values())))
            else:
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows(rows)
