"""Preparation from end to end: what is written can be read back, what is bad is counted, nothing half-done is left."""

import errno
import io
import json
import os
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest

from mmoe.commands.console import Console
from mmoe.commands.prepare import show_summary
from mmoe.config.base import Config
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_member
from mmoe.data.load.frames import VideoFrames
from mmoe.data.load.media import load_audio, load_image
from mmoe.data.load.tables import load_array
from mmoe.errors import ConfigError, DataError
from mmoe.hashing import hash64
from mmoe.preparation import chunks, sources, splits
from mmoe.preparation.prepare import prepare, training_texts
from mmoe.preparation.sources.base import Item, Refused, Source
from mmoe.schema.manifest import SPLITS, SourceManifest, SplitEntry
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment
from mmoe.tokenizers.audio import MelCodec
from mmoe.tokenizers.text import TextTokenizer
from tests.data.recordings import (
    drive_records,
    images,
    npy,
    png,
    video,
    write_audio,
    write_captions,
    write_jsonl,
    write_tub,
)

TOKENIZER = TextTokenizer.bytes()
SMALL_CODEC = {"audio": {"codebooks": 2, "mel": {"codebook_size": 8}}}


def run(kind, path, output, workers=1, **options):
    console = Console(file=io.StringIO(), width=120)
    made = prepare(kind, path, output, text_tokenizer=TOKENIZER, workers=workers, options=options)
    show_summary(made.summary, console)
    assert SourceManifest.load(output) == made.manifest
    return made.manifest, console.file.getvalue()


def rows(folder, manifest, split):
    """(index, row) of every sample of a split."""
    for shard in manifest.splits[split].shards:
        index = ShardIndex.read(folder / shard.path)
        yield from ((index, row) for row in range(len(index)))


def keys(folder, manifest, split):
    return [index.keys[row] for index, row in rows(folder, manifest, split)]


def payload(index, row, segment):
    name, offset, size = index.row_member(row, int(segment["member"]))
    return read_member(index.tar, offset, size, f"{index.keys[row]}.{name}"), f"{index.keys[row]}.{name}"


def read_everything(folder, manifest):
    """Decode each segment of each row as training does; counts by split and modality."""
    counts = Counter()
    for split in SPLITS:
        for index, row in rows(folder, manifest, split):
            for segment in index.row_segments(row):
                kind, start, stop = Modality(segment["modality"]), int(segment["start"]), int(segment["stop"])
                data, where = payload(index, row, segment)
                counts[split, kind.name] += 1
                if kind is Modality.TEXT:
                    text = TOKENIZER.decode(index.row_text(row)[start:stop])
                    assert text in json.dumps(data.decode(), ensure_ascii=False) or text.encode() in data
                    assert segment["text_hash"] == hash64(text.encode())
                elif kind is Modality.AUDIO:
                    wave, rate = load_audio(data, start, stop, where)
                    assert len(wave) == stop - start and rate == segment["rate"]
                elif kind is Modality.VISION:
                    if where.endswith(".mp4"):
                        shown = VideoFrames(data, "auto", where).frames(np.arange(start, stop))[0]
                    else:
                        shown = load_image(data, where)
                    assert shown.shape[:2] == (segment["height"], segment["width"])
                else:
                    table = load_array(data, where)
                    assert 0 <= start < stop <= len(table)
                    assert table.shape[1] == len(manifest.vectors[kind.name].names)
    for split in SPLITS:
        entry = manifest.splits[split]
        assert {kind: entry.segments(kind) for kind in Modality.names if entry.segments(kind)} == {
            kind: n for (side, kind), n in sorted(counts.items()) if side == split
        }
        assert entry.samples == sum(shard.rows for shard in entry.shards)
    return counts


def quarantine(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_text_is_stored_beside_its_ids(tmp_path):
    lines = [f"Zeile {i}: 吾輩は猫である。\r\n" for i in range(300)]
    (tmp_path / "book.txt").write_bytes("".join(lines).encode())
    manifest, printed = run("text", tmp_path / "book.txt", tmp_path / "out", max_bytes=500)
    read_everything(tmp_path / "out", manifest)
    texts = {
        split: [TOKENIZER.decode(i.row_text(r)) for i, r in rows(tmp_path / "out", manifest, split)] for split in SPLITS
    }
    assert "".join(texts["train"]) + "".join(texts["heldout"]) == "".join(lines)
    share = len("".join(texts["heldout"]).encode()) / len("".join(lines).encode())
    assert 0.13 < share <= 0.15
    assert manifest.clock == "none" and manifest.text_fingerprint == TOKENIZER.fingerprint
    assert "text tokens" in printed and not manifest.quarantined
    assert texts["train"] == list(training_texts("text", tmp_path / "book.txt", {"max_bytes": 500}))


def test_audio_hold_out_the_last_take_and_fit_a_codec(tmp_path):
    write_audio(tmp_path / "in", takes=4)
    manifest, printed = run("audio_text", tmp_path / "in", tmp_path / "out", prepare=SMALL_CODEC)
    assert read_everything(tmp_path / "out", manifest)["heldout", "AUDIO"] == 4
    assert all(key.endswith("_3") for key in keys(tmp_path / "out", manifest, "heldout"))
    codec = MelCodec.load(tmp_path / "out" / "audio_codec.safetensors")
    report = json.loads((tmp_path / "out" / "audio_codec.json").read_text())
    assert report["fingerprint"] == codec.fingerprint and report["split"] == "heldout"
    assert (
        list(report["reconstruction_error"]) == ["1", "2"] and f"{report['reconstruction_error']['2']:.3f}" in printed
    )
    (index, row), *_ = rows(tmp_path / "out", manifest, "train")
    sound, words = index.row_segments(row)
    wave, rate = load_audio(payload(index, row, sound)[0], 0, int(sound["stop"]), "x")
    assert len(codec.encode(wave, rate)) == codec.num_frames(int(sound["stop"]), rate)
    assert sound["pair"] == words["pair"] == 0


def test_a_tub_gives_its_tail_after_two_seconds(tmp_path):
    write_tub(tmp_path / "tub", drive_records(400))
    manifest, _ = run("donkeycar", tmp_path / "tub", tmp_path / "out")
    counts = read_everything(tmp_path / "out", manifest)
    assert counts["train", "VISION"] == 300 and counts["heldout", "VISION"] == 60  # 40 records are 2 s
    assert manifest.quarantined == {"gap before the held-out tail": 8}
    assert manifest.clock == "synthetic" and manifest.vectors["ACTION"].period_ns == 50_000_000
    assert manifest.vectors["ACTION"].names == ("steering", "throttle")
    # No action of the held-out part is in a training table, and the other way round.
    held = {float(np.float32(r["user/angle"])) for r in drive_records(400)[340:]}
    for index, row in rows(tmp_path / "out", manifest, "train"):
        table = load_array(payload(index, row, index.row_segments(row)[1])[0], "x")
        assert not held & set(table[:, 0].tolist())


def test_simulated_drives_are_whole_and_equal_for_any_number_of_workers(tmp_path):
    options = {"recordings": 9, "slices": [1, 2], "prepare": SMALL_CODEC | {"shard_rows": 3}}
    manifest, _ = run("simulated_drive", "unused", tmp_path / "one", **options)
    counts = read_everything(tmp_path / "one", manifest)
    slices = counts["train", "STATE"]
    assert counts["train", "VISION"] == 6 * slices and counts["train", "TEXT"] == slices
    assert manifest.splits["train"].samples == 8 and len(manifest.splits["train"].shards) == 3
    assert manifest.skew_budget_ns > 0 and set(manifest.vectors) == {"ACTION", "STATE", "INERTIAL"}

    again, _ = run("simulated_drive", "unused", tmp_path / "two", workers=2, **options)
    assert again == manifest
    for split in SPLITS:
        assert keys(tmp_path / "one", manifest, split) == keys(tmp_path / "two", manifest, split)
        for file in (tmp_path / "one" / split).glob("*.tar"):
            assert file.read_bytes() == (tmp_path / "two" / split / file.name).read_bytes()
    fingerprints = {MelCodec.load(tmp_path / n / "audio_codec.safetensors").fingerprint for n in ("one", "two")}
    assert len(fingerprints) == 1


@pytest.fixture
def log_source(monkeypatch):
    """A source of tables and videos whose content the test decides: `files` is (key, member, modality, bytes)."""
    files = []

    def items(path, config, refuse):
        for key, member, modality, data in files:
            geometry = {"height": 48, "width": 64} if modality is Modality.VISION else {}
            segments = [Segment(modality, member, slice=0, **geometry)]
            sample = Sample(key, key, {member: data}, segments, Counter({f"{modality.name}: late": 2}))
            yield Item(key, key, partial(lambda s: s, sample))

    source = Source("log", "captured", 0, Config, items, {"STATE": ("speed", "gear")}, generated=True)
    monkeypatch.setitem(sources.SOURCES._registered, "log", source)
    return files


def test_statistics_are_those_of_the_training_tables(tmp_path, log_source):
    rng = np.random.default_rng(0)
    tables = {f"t{i}": (rng.normal(size=(50, 2)) * [1, 100]).astype(np.float32) for i in range(8)}
    log_source += [(key, "state.npy", Modality.STATE, npy(table)) for key, table in tables.items()]
    manifest, _ = run("log", "-", tmp_path / "out")
    train = np.concatenate([tables[key] for key in keys(tmp_path / "out", manifest, "train")]).astype(np.float64)
    assert len(train) == 350
    stats = manifest.vectors["STATE"]
    assert stats.names == ("speed", "gear") and stats.period_ns == 0
    np.testing.assert_allclose(stats.mean, train.mean(0))
    np.testing.assert_allclose(stats.std, train.std(0))
    ordered = np.sort(train, axis=0)
    for given, share in ((stats.q01, 0.01), (stats.q99, 0.99)):
        at = share * (len(ordered) - 1)
        low = ordered[int(at)] + (ordered[int(at) + 1] - ordered[int(at)]) * (at - int(at))
        np.testing.assert_allclose(given, low)


def test_glitches_are_clipped_counted_and_shown(tmp_path, log_source):
    rng = np.random.default_rng(0)
    tables = {f"t{i}": rng.normal(size=(500, 2)).astype(np.float32) for i in range(8)}
    tables["t0"][8, 1] = -65535
    log_source += [(key, "state.npy", Modality.STATE, npy(table)) for key, table in tables.items()]
    log_source.append(("u", "state.npy", Modality.STATE, npy(np.full((9, 2), 1e300))))
    manifest, printed = run("log", "-", tmp_path / "out")
    stats = manifest.vectors["STATE"]
    held = keys(tmp_path / "out", manifest, "heldout")
    assert stats.clipped == {"train": (0, "t0" not in held), "heldout": (0, "t0" in held)}
    assert stats.minimum[1] == -65535 and 0.9 < stats.std[1] < 1.1
    assert re.search(r"clipped: STATE gear +│ +1 of 3,500 +│ +0 of 500", printed)
    assert manifest.quarantined == {"unusable state table": 1}
    assert "beyond what float32 holds" in quarantine(tmp_path / "out")[0]["message"]


def test_bad_recordings_are_counted_and_the_rest_is_prepared(tmp_path, log_source):
    good = [(f"good{i}", "state.npy", Modality.STATE, npy(np.full((3, 2), i, np.float32))) for i in range(7)]
    nan = np.zeros((9, 2), np.float32)
    nan[4, 1] = np.nan
    clip = video(images(4))
    bad = [
        ("nan", "state.npy", Modality.STATE, npy(nan)),
        ("wide", "state.npy", Modality.STATE, npy(np.zeros((3, 3)))),
        ("none", "state.npy", Modality.STATE, npy(np.zeros((0, 2)))),
        ("cut", "front.mp4", Modality.VISION, clip[: len(clip) // 2]),
        ("size", "front.mp4", Modality.VISION, video(images(4, 64, 64))),
        ("clip_1.5s", "state.npy", Modality.STATE, npy(np.zeros((3, 2)))),
        ("case", "State.npy", Modality.STATE, npy(np.zeros((3, 2)))),
        ("audio", "a.wav", Modality.AUDIO, b"RIFF"),
    ]
    log_source += [*bad, *good, good[3], ("fine", "front.mp4", Modality.VISION, clip)]
    manifest, printed = run("log", "-", tmp_path / "out")
    found = keys(tmp_path / "out", manifest, "train") + keys(tmp_path / "out", manifest, "heldout")
    assert sorted(found) == sorted([key for key, *_ in good] + ["fine"])
    assert manifest.quarantined == {
        "duplicate key": 1,
        "malformed sample": 1,
        "unreadable image or video": 2,
        "unreadable audio": 1,
        "unusable key": 1,
        "unusable state table": 3,
    }
    said = {line["key"]: line["message"] for line in quarantine(tmp_path / "out")}
    assert "nan.state.npy: row 4, column 1 is nan" in said["nan"]
    assert "3 dimensions, the source names 2" in said["wide"]
    assert "none.state.npy holds 0 entries" in said["none"]
    assert "cut.front.mp4 cannot be read as a video" in said["cut"]
    assert "64 x 64 pixels, its segment says 48 x 64" in said["size"]
    assert "has a dot in its last part" in said["clip_1.5s"] and "rename" in said["clip_1.5s"]
    assert "lower-case" in said["case"]
    assert "occurs twice" in said["good3"]
    assert sum(manifest.quarantined.values()) == len(quarantine(tmp_path / "out"))
    assert "refused: unusable state table" in printed


def test_no_content_is_on_both_sides(tmp_path):
    """An image that is held out stays out of the training part, whatever its caption or name."""
    write_captions(tmp_path / "in", 8)
    same = (tmp_path / "in/images/p2.png").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "in/captions.jsonl").read_text().splitlines()]
    for i in range(40):
        name = f"images/copy{i}.png"
        (tmp_path / "in" / name).write_bytes(same)
        lines.append({"image": name, "caption": f"again {i}"})
    write_jsonl(tmp_path / "in/captions.jsonl", lines)
    manifest, _ = run("image_caption", tmp_path / "in", tmp_path / "out")
    hashes = {}
    for split in SPLITS:
        found = [payload(i, r, i.row_segments(r)[0])[0] for i, r in rows(tmp_path / "out", manifest, split)]
        hashes[split] = set(found)
    assert same in hashes["heldout"] and not hashes["train"] & hashes["heldout"]
    assert manifest.splits["heldout"].samples == 7
    left_out = manifest.removed["duplicate of a held-out sample"]
    assert left_out + manifest.splits["train"].samples + 7 == 48 and left_out > 30


def test_a_name_with_a_dot_and_a_missing_file_on_disk(tmp_path):
    write_captions(tmp_path / "in", 5)
    (tmp_path / "in/images/clip_1.5s.png").write_bytes(png(images(9)[8]))
    lines = (tmp_path / "in/captions.jsonl").read_text()
    lines += '{"image": "images/clip_1.5s.png", "caption": "x"}\n{"image": "images/gone.png", "caption": "x"}\n'
    (tmp_path / "in/captions.jsonl").write_text(lines)
    manifest, _ = run("image_caption", tmp_path / "in", tmp_path / "out")
    assert manifest.quarantined == {"missing file": 1}
    found = keys(tmp_path / "out", manifest, "train") + keys(tmp_path / "out", manifest, "heldout")
    assert "images/clip_1%2E5s" in found


def test_when_nothing_is_left_the_commonest_reason_is_said_and_the_list_stays(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.doc").write_bytes(b"first in the list, but one of its kind")
    for i in range(1, 4):
        (tmp_path / "in" / f"{i}.txt").write_bytes(b"\xff")
    said = (
        "no sample for the split train: 4 were refused.*'text is not UTF-8' .3., as here: .*byte 0 .0xff. is not UTF-8"
    )
    with pytest.raises(DataError, match=said) as caught:
        run("text", tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.quarantine.jsonl"]
    assert str(tmp_path / "out.quarantine.jsonl") in str(caught.value)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert Counter(reasons) == {"text is not UTF-8": 3, "file of another kind": 1}
    for file in (tmp_path / "in").iterdir():
        file.unlink() if file.suffix == ".doc" else file.write_bytes(b"")
    with pytest.raises(DataError, match="no sample for the split train; add recordings"):
        run("text", tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_names_out_of_json_that_are_not_utf8_cost_their_sample(tmp_path):
    write_captions(tmp_path / "in", 5)
    rows = [json.loads(line) for line in (tmp_path / "in/captions.jsonl").read_text().splitlines()]
    odd = os.fsdecode(b"images/caf\xe9.png")
    (tmp_path / "in" / rows[1]["image"]).rename(tmp_path / "in" / odd)
    rows[1]["image"] = odd
    (tmp_path / "in/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "\\udce9" in (tmp_path / "in/captions.jsonl").read_text()
    manifest, _ = run("image_caption", tmp_path / "in", tmp_path / "out")
    assert set(manifest.quarantined) == {"name is not UTF-8"}
    assert sum(entry.samples for entry in manifest.splits.values()) == 4


def test_what_no_reader_foresaw_costs_its_item_and_is_reported_with_its_place(tmp_path, monkeypatch):
    def make(number):
        if number == 2:
            return {}["field"]
        if number == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return Sample(f"k{number}", f"k{number}", {"txt": b"words"}, [Segment(Modality.TEXT, "txt", text=f"w{number}")])

    def items(path, config, refuse):
        return (Item(f"k{n}", f"k{n}", partial(make, n)) for n in numbers)

    monkeypatch.setitem(sources.SOURCES._registered, "log", Source("log", "none", 0, Config, items, generated=True))
    numbers = (0, 1, 2, 4)
    manifest, _ = run("log", "-", tmp_path / "out", prepare={"heldout_share": 0})
    assert manifest.quarantined == {"reader failed": 1}
    (line,) = quarantine(tmp_path / "out")
    assert re.search(r"k2: the reader failed with KeyError \('field'\) in test_prepare.py, line \d+", line["message"])
    numbers = (0, 3)
    with pytest.raises(OSError, match="No space left"):
        run("log", "-", tmp_path / "full", prepare={"heldout_share": 0})


def test_a_source_that_cannot_be_listed_is_named_with_what_was_refused_before(tmp_path, monkeypatch):
    def items(path, config, refuse):
        refuse("a", Refused("odd", "a is odd"))
        raise KeyError("fps")
        yield

    monkeypatch.setitem(sources.SOURCES._registered, "log", Source("log", "none", 0, Config, items, generated=True))
    said = "cannot be read as a source of kind log .KeyError: 'fps'.*1 for the reason 'odd'"
    with pytest.raises(DataError, match=said):
        run("log", "-", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.quarantine.jsonl"]


def test_where_all_that_was_held_out_is_refused_others_are_held_out(tmp_path, log_source):
    """One bad file in six, and the split draws it: the preparation goes on as if it had not been there."""
    tables = {f"k{i}": npy(np.full((3, 2), i, np.float32)) for i in range(6)}
    drawn = splits.split_recordings([Item(key, key, str) for key in tables], 0.15, 0).heldout[0].key
    log_source += [(k, "state.npy", Modality.STATE, t if k != drawn else t[:60]) for k, t in tables.items()]
    manifest, _ = run("log", "-", tmp_path / "out")
    assert manifest.quarantined == {"unusable state table": 1}
    assert [line["key"] for line in quarantine(tmp_path / "out")] == [drawn]
    assert (manifest.splits["train"].samples, manifest.splits["heldout"].samples) == (4, 1)
    log_source[:] = [line for line in log_source if line[0] != drawn]
    run("log", "-", tmp_path / "without")
    for side in SPLITS:
        assert keys(tmp_path / "without", manifest, side) == keys(tmp_path / "out", manifest, side)


def test_the_gap_before_the_tail_is_not_named_as_what_went_wrong(tmp_path):
    records = drive_records(100)
    write_tub(tmp_path / "in", records)
    for file in (tmp_path / "in/images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="The commonest reason is 'missing file'"):
        run("donkeycar", tmp_path / "in", tmp_path / "out")


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("step", ["run", "_remove_duplicates", "write_lists", "vector_stats", "SourceManifest.save"])
def test_a_preparation_broken_off_anywhere_goes_on_to_the_same_result(tmp_path, log_source, monkeypatch, caplog, step):
    """Twice interrupted after half of a step's work, it ends as it would have, and no finished chunk is made again."""
    tables = [npy(np.full((3, 2), i % 37, np.float32)) for i in range(40)]
    log_source += [(f"k{i:02d}", "state.npy", Modality.STATE, table) for i, table in enumerate(tables)]
    options = {"prepare": {"shard_rows": 4}}
    whole, _ = run("log", "-", tmp_path / "whole", **options)
    assert whole.removed and sum(whole.removed.values()) == 3
    made, make_row = Counter(), chunks.make_row

    def counted(item, *rest):
        made[item.key] += 1
        return make_row(item, *rest)

    def interrupted(*arguments):
        if step == "run":
            work, tasks, *_ = arguments
            yield from map(work, tasks[: len(tasks) // 2])
        raise KeyboardInterrupt

    def stop(*arguments):
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(chunks, "make_row", counted)
            patch.setattr(f"mmoe.preparation.prepare.{step}", interrupted if step == "run" else stop)
            run("log", "-", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(chunks, "make_row", counted)
    resumed, _ = run("log", "-", tmp_path / "out", **options)
    assert resumed == whole and files(tmp_path / "out") == files(tmp_path / "whole")
    assert "going on" in caplog.text
    assert made.total() == 40 + 8  # the probes that the size of a chunk is estimated from are made twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_a_chunk_that_lost_bytes_is_made_again(tmp_path, log_source, monkeypatch, caplog):
    log_source += [(f"k{i}", "state.npy", Modality.STATE, npy(np.full((3, 2), i, np.float32))) for i in range(20)]
    options = {"prepare": {"shard_rows": 5}}
    run("log", "-", tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("mmoe.preparation.prepare._find_duplicates", lambda *_: 1 / 0)
        run("log", "-", tmp_path / "out", **options)
    tar = tmp_path / ".out.unfinished" / "chunks" / "train-000001" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:512])
    run("log", "-", tmp_path / "out", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole") and "16 of 20 items are done" in caplog.text


def test_duplicates_leave_no_trace_in_what_is_counted(tmp_path, log_source):
    rng = np.random.default_rng(0)
    tables = [(f"k{i:02d}", "state.npy", Modality.STATE, npy(rng.normal(size=(i + 1, 2)))) for i in range(20)]
    log_source += tables
    options = {"prepare": {"shard_rows": 6, "heldout_share": 0}}
    once, _ = run("log", "-", tmp_path / "once", **options)
    log_source += [(f"z{key}", *rest) for key, *rest in tables[3:15]]
    twice, _ = run("log", "-", tmp_path / "twice", **options)
    assert twice.removed == {"duplicate of an earlier sample": 12}
    assert once.splits["train"].flagged == {"STATE: late": 40}
    unlike = {"shards"}  # more items are cut elsewhere
    for name in set(SplitEntry.model_fields) - unlike:
        assert getattr(once.splits["train"], name) == getattr(twice.splits["train"], name)
    for name in ("mean", "std", "q01", "q99"):
        np.testing.assert_allclose(getattr(once.vectors["STATE"], name), getattr(twice.vectors["STATE"], name))


def test_equal_samples_of_a_source_are_kept_once(tmp_path):
    """Of equal lines the first stays; an image with two captions is two samples, not a duplicate."""
    lines = [{"text": f"line {i % 30} says {'x' * (i % 30)}"} for i in range(80)]
    write_jsonl(tmp_path / "in" / "a.jsonl", lines)
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": f"other {i}"} for i in range(5)])
    manifest, printed = run("text", tmp_path / "in", tmp_path / "out", prepare={"heldout_share": 0})
    found = keys(tmp_path / "out", manifest, "train")
    assert found == [f"a-{i:06d}" for i in range(30)] + [f"b-{i:06d}" for i in range(5)]
    assert manifest.removed == {"duplicate of an earlier sample": 50} and not manifest.quarantined
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    kept = sum(len(f"line {i} says {'x' * i}") for i in range(30)) + 5 * len("other 0")
    assert re.search(rf"text bytes +│ +{kept:,} ", printed)
    assert len(removed) == 50 and {line["key"]: line["duplicate_of"] for line in removed}["a-000073"] == "a-000013"
    assert "removed: duplicate of an earlier sample" in printed

    write_captions(tmp_path / "images", 6)
    rows = [json.loads(line) for line in (tmp_path / "images/captions.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "images/captions.jsonl", [row | {"more": f"again {row['caption']}"} for row in rows])
    manifest, _ = run("image_caption", tmp_path / "images", tmp_path / "out2", columns={"caption": ["caption", "more"]})
    assert not manifest.removed and sum(split.samples for split in manifest.splits.values()) == 12


def test_what_cannot_be_prepared_is_said_at_once(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist; give the file or folder"):
        run("text", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="out already exists; delete it"):
        run("text", tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    with pytest.raises(ConfigError, match="max_byte is not a known key; did you mean max_bytes"):
        run("text", tmp_path, tmp_path / "new", max_byte=3)
    with pytest.raises(ConfigError, match="under prepare: held_share is not a known key; did you mean heldout_share"):
        run("text", tmp_path, tmp_path / "new", prepare={"held_share": 0.1})
    with pytest.raises(ConfigError, match="did you mean donkeycar"):
        run("donkey", tmp_path, tmp_path / "new")


def test_a_list_says_what_is_held_out_and_names_in_it_that_are_of_no_sample_are_said(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": f"line {i}"} for i in range(20)])
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": f"other {i}"} for i in range(20)])
    listed = tmp_path / "test.txt"
    listed.write_text("\ufeffa-000007\nb-000001\n\nb-000999\n", encoding="utf-8")
    manifest, printed = run("text", tmp_path / "in", tmp_path / "out", prepare={"heldout_list": str(listed)})
    assert keys(tmp_path / "out", manifest, "heldout") == ["a-000007", "b-000001"]
    assert manifest.splits["train"].samples == 38
    assert "1 of its 3 names are of no sample in" in printed and ": b-000999" in printed
    listed.write_text("c\n")
    with pytest.raises(DataError, match=r"test.txt: none of its 1 lines is the key or the recording .* \(c\)"):
        run("text", tmp_path / "in", tmp_path / "other", prepare={"heldout_list": str(listed)})
    listed.write_text("\n")
    with pytest.raises(DataError, match="test.txt names nothing to hold out"):
        run("text", tmp_path / "in", tmp_path / "other", prepare={"heldout_list": str(listed)})
    with pytest.raises(ConfigError, match="heldout_list says what is held out; leave out heldout_share"):
        run("text", tmp_path / "in", tmp_path / "other", prepare={"heldout_list": str(listed), "heldout_share": 0.1})
    with pytest.raises(DataError, match="nowhere.txt"):
        run("text", tmp_path / "in", tmp_path / "other", prepare={"heldout_list": str(tmp_path / "nowhere.txt")})


def test_a_source_that_is_held_out_as_a_whole_has_no_training_side_and_no_codec(tmp_path):
    write_audio(tmp_path / "in")
    manifest, _ = run("audio_text", tmp_path / "in", tmp_path / "out", prepare={"heldout_share": 1})
    assert manifest.splits["train"].samples == 0 and manifest.splits["heldout"].samples == 12 and manifest.holds_out
    assert not list((tmp_path / "out").glob("*.safetensors"))
    write_tub(tmp_path / "tub", drive_records(120))
    manifest, printed = run("donkeycar", tmp_path / "tub", tmp_path / "drives", prepare={"heldout_share": 1})
    assert manifest.splits["train"].samples == 0 and manifest.vectors["ACTION"].names == ("steering", "throttle")
    assert "samples" in printed
