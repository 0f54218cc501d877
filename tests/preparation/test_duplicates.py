"""Duplicates: planted ones are found, the first stays, held-out samples win, and what is different is kept."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmoe.errors import DataError
from mmoe.preparation.duplicates import Duplicates, ImageIndex
from mmoe.preparation.prepare import prepare
from mmoe.preparation.signatures import DedupConfig, Signatures, image_hash, shingles, text_signature
from mmoe.preparation.statistics import VectorSummary
from mmoe.tokenizers.text import TextTokenizer
from tests.data.recordings import png, write_jsonl

pytest.importorskip("datasketch")
pytest.importorskip("imagehash")
NEAR = {"prepare": {"dedup": {"near": True}}}
WORDS = [f"{a}{b}{c}" for a in ("ka", "mo", "ri", "su", "te") for b in ("lan", "ner", "vik") for c in ("a", "o", "um")]


def run(kind, source, output, options=NEAR, tokenizer=None):
    tokenizer = tokenizer or TextTokenizer.bytes()
    return prepare(kind, source, output, text_tokenizer=tokenizer, options=options).manifest


def removed(folder):
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def text(seed, length=150):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def edited(original, share, seed=0):
    """The text with that share of its words replaced."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + "x" if draw.random() < share else word for word in original.split())


def picture(seed, side=64):
    """An image of a few large soft shapes [side, side, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def signatures(contents, samples=None):
    count = len(contents)
    return Signatures(
        np.arange(count),
        np.array(contents),
        np.array(samples or contents),
        *(np.zeros((0, 4)) for _ in range(4)),
    )


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(0, 2**64 - 1), st.integers(0, 11), st.data())
def test_the_image_index_finds_all_that_comparing_each_finds(hashes, query, bits, data):
    for _ in range(3):  # near ones: at random there are none
        flipped = data.draw(st.lists(st.integers(0, 63), max_size=13, unique=True))
        hashes = [*hashes, query ^ sum(1 << bit for bit in flipped)]
    index = ImageIndex(bits)
    for number in hashes:
        index.add(number)
    expected = [(bin(number ^ query).count("1"), place) for place, number in enumerate(hashes)]
    assert index.near(query) == [place for distance, place in sorted(expected) if distance <= bits]


@given(st.text(min_size=1), st.integers(1, 9))
def test_shingles_are_as_many_as_the_runs_that_differ(value, length):
    normal = shingles(value, 1)
    assert np.array_equal(shingles(f" {value}\n ", 1), normal)
    runs = shingles("".join(WORDS), length)
    assert len(runs) == len({"".join(WORDS)[i : i + length] for i in range(len("".join(WORDS)) - length + 1)})


def test_signatures_estimate_the_share_of_common_runs():
    first, second = text(1), edited(text(1), 0.1)
    sets = [set(shingles(t, 8).tolist()) for t in (first, second)]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    estimate = np.mean(text_signature(first, 8, 512) == text_signature(second, 8, 512))
    assert abs(estimate - jaccard) < 4 * np.sqrt(jaccard * (1 - jaccard) / 512)
    assert text_signature("seven..", 8, 16) is None


def test_the_order_of_rules():
    """Held-out samples go before training ones, other sources before this one, and the first before the next."""
    duplicates = Duplicates(DedupConfig())
    duplicates.reference("heldout", signatures([1]), ["other: h"], ["r"])
    duplicates.reference("train", signatures([2]), ["other: t"], ["r"])
    names = [f"k{i}" for i in range(5)]
    held = list(duplicates.judge("heldout", signatures([1, 2, 3, 3, 4]), names, names))
    assert [(d.row, d.of) for d in held] == [(1, "other: t"), (3, "k2")]
    names = [f"t{i}" for i in range(6)]
    rows = signatures([1, 2, 4, 5, 5, 5], [11, 2, 14, 15, 15, 16])  # the last: the same content, said differently
    found = [(d.row, d.reason, d.of) for d in duplicates.judge("train", rows, names, names)]
    assert found == [
        (0, "duplicate of a held-out sample", "other: h"),
        (1, "duplicate of an earlier sample", "other: t"),
        (2, "duplicate of a held-out sample", "k4"),
        (4, "duplicate of an earlier sample", "t3"),
    ]


def write_recordings(folder, count=8):
    """One text of its own in each recording."""
    for name in range(count):
        write_jsonl(folder / f"r{name}.jsonl", [{"text": text(f"{name}-{i}")} for i in range(6)])


def test_near_duplicates_go_from_training_and_the_first_stays(tmp_path):
    write_recordings(tmp_path / "in")
    plain = run("text", tmp_path / "in", tmp_path / "plain", {})
    held = next(tmp_path.glob("plain/heldout/*.tar")).read_bytes()
    held = next(name for name in map("r{}".format, range(8)) if f"{name}-000000.txt".encode() in held)
    kept = [f"r{name}" for name in range(8) if f"r{name}" != held]
    number = held.removeprefix("r")
    near = [{"text": edited(text(f"{number}-2"), 0.02)}, {"text": edited(text(f"{kept[0][1:]}-3"), 0.02)}]
    near += [{"text": edited(near[1]["text"], 0.01)}, {"text": edited(text(f"{kept[0][1:]}-4"), 0.7)}]
    path = tmp_path / "in" / f"{kept[-1]}.jsonl"
    write_jsonl(path, [json.loads(line) for line in path.read_text().splitlines()] + near)
    manifest = run("text", tmp_path / "in", tmp_path / "out")
    lines = removed(tmp_path / "out")
    assert [(line["reason"], line["key"], line["duplicate_of"]) for line in lines] == [
        ("near duplicate of a held-out sample", f"{kept[-1]}-000006", f"{held}-000002"),
        ("near duplicate of an earlier sample", f"{kept[-1]}-000007", f"{kept[0]}-000003"),
        ("near duplicate of an earlier sample", f"{kept[-1]}-000008", f"{kept[0]}-000003"),
    ]
    assert manifest.splits["heldout"] == plain.splits["heldout"]
    assert manifest.splits["train"].samples == plain.splits["train"].samples + 1  # the one that was edited beyond


def test_another_source_is_not_repeated_and_its_heldout_side_not_learnt(tmp_path):
    write_recordings(tmp_path / "first")
    first = run("text", tmp_path / "first", tmp_path / "one", {})
    for name in range(8):
        own = [{"text": text(f"own-{name}-{i}")} for i in range(4)]
        borrowed = [{"text": text(f"{name}-1")}, {"text": edited(text(f"{name}-3"), 0.02)}]
        write_jsonl(tmp_path / "second" / f"s{name}.jsonl", own + borrowed)
    options = {"prepare": {"dedup": {"against": [str(tmp_path / "one")]}}}
    exact = run("text", tmp_path / "second", tmp_path / "exact", options)
    assert sum(exact.removed.values()) == 8
    options["prepare"]["dedup"]["near"] = True
    near = run("text", tmp_path / "second", tmp_path / "near", options)
    assert sum(near.removed.values()) >= 15  # a held-out text may stay that repeats another's held-out one
    assert {"duplicate of an earlier sample", "near duplicate of an earlier sample"} < set(near.removed)
    assert all(line["duplicate_of"].startswith(f"{tmp_path / 'one'}: r") for line in removed(tmp_path / "near"))
    assert first.splits["heldout"].samples == 6

    trained = TextTokenizer.train([text(1)], 300)
    with pytest.raises(DataError, match="another text tokenizer, so its texts cannot be compared"):
        run("text", tmp_path / "second", tmp_path / "other", options, trained)


def test_resized_and_recompressed_images_are_found(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    rows = []
    for i in range(12):
        (tmp_path / "in" / "images" / f"p{i:02d}.png").write_bytes(png(picture(i)))
        rows.append({"image": f"images/p{i:02d}.png", "caption": f"image {i}"})
    for i in (1, 4, 9):
        image = Image.fromarray(picture(i)).resize((100, 90))
        image.save(tmp_path / "in" / "images" / f"q{i:02d}.jpg", quality=50)
        rows.append({"image": f"images/q{i:02d}.jpg", "caption": "the same, smaller"})
    rows[2]["more"] = "the same image said twice is kept twice"
    write_jsonl(tmp_path / "in" / "captions.jsonl", rows)
    options = {"columns": {"caption": ["caption", "more"]}, "prepare": {**NEAR["prepare"], "heldout_share": 0}}
    manifest = run("image_caption", tmp_path / "in", tmp_path / "out", options)
    assert manifest.splits["train"].samples == 13
    pairs = {line["key"][-3:]: line["duplicate_of"][-3:] for line in removed(tmp_path / "out")}
    assert pairs == {"q01": "p01", "q04": "p04", "q09": "p09"}


def test_an_image_of_one_tone_has_no_hash():
    flat = np.full((64, 64, 3), 128, np.uint8)
    assert image_hash(png(flat), "x") is None and image_hash(png(picture(3)), "x") is not None


# Statistics, which duplicates must not leave traces in.


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 8), st.integers(1, 64))
def test_summaries_do_not_depend_on_how_tables_are_grouped(lengths, group, capacity):
    rng = np.random.default_rng(sum(lengths))
    tables = [(rng.normal(size=(n, 2)) * [1, 1e3] + [1e4, 0]).astype(np.float32) for n in lengths]
    whole = VectorSummary(2, capacity)
    parts = [VectorSummary(2, capacity) for _ in range(0, len(tables), group)]
    for number, table in enumerate(tables):
        whole.add(table, number)
        parts[number // group].add(table, number)
    merged = VectorSummary(2, capacity)
    for part in parts:
        stored = VectorSummary.from_arrays(part.arrays(), capacity)
        merged.merge(stored)
    rows = np.concatenate(tables).astype(np.float64)
    for summary in (whole, merged):
        stats = summary.stats(("a", "b"), 0, knots=5)
        np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.std, rows.std(0), rtol=1e-6, atol=1e-9)
    assert np.array_equal(whole.sample(), merged.sample()) and len(whole.sample()) == min(capacity, len(rows))
    if len(rows) <= capacity:
        np.testing.assert_allclose(stats.q01, np.quantile(rows, 0.01, axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.quantiles, np.quantile(rows, np.linspace(0, 1, 5), axis=0).T, rtol=1e-12)


def test_the_reservoir_is_a_fair_sample():
    rng = np.random.default_rng(0)
    summary = VectorSummary(1, 4096)
    tables = [np.sort(rng.normal(size=(1000, 1)), axis=0) + i / 50 for i in range(100)]
    for number, table in enumerate(tables):
        summary.add(table.astype(np.float32), number)
    rows, sample = np.concatenate(tables)[:, 0], summary.sample()[:, 0]
    for share in (0.01, 0.5, 0.99):
        rank = (rows <= np.quantile(sample, share)).mean()
        assert abs(rank - share) < 4 * np.sqrt(share * (1 - share) / 4096)


@pytest.mark.real_data
def test_planted_duplicates_of_real_text_are_found_and_nothing_else(shared_data, tmp_path):
    """Pieces of two books with 2 % of their words or 1 % of their characters edited: recall and false positives."""
    draw = random.Random(0)
    english = (shared_data / "text" / "tinyshakespeare.txt").read_text()
    japanese = (shared_data / "text" / "wagahaiwa_nekodearu.ja.txt").read_text()
    pieces = [english[at : at + 1200] for at in range(0, 240_000, 1200)]
    pieces += [japanese[at : at + 600] for at in range(0, 60_000, 600)]
    planted = []
    for piece in draw.sample(pieces, 60):
        if " " in piece:
            planted.append(
                "".join("edited" if w.strip() and draw.random() < 0.02 else w for w in re.split(r"(\s+)", piece))
            )
        else:
            planted.append("".join("変" if draw.random() < 0.01 else c for c in piece))
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": piece} for piece in pieces + planted])
    options = {"prepare": {"heldout_share": 0, "dedup": {"near": True}}}
    run("text", tmp_path / "in", tmp_path / "out", options)
    found = [int(line["key"].rpartition("-")[2]) for line in removed(tmp_path / "out")]
    false = [number for number in found if number < len(pieces)]
    print(f"recall {(len(found) - len(false)) / 60:.3f}, false {len(false)} of {len(pieces)}")
    assert len(found) - len(false) >= 57 and not false


@pytest.mark.real_data
def test_planted_duplicates_of_real_images_are_found_and_nothing_else(shared_data, tmp_path):
    rows = [json.loads(line) for line in (shared_data / "image_caption" / "captions.jsonl").read_text().splitlines()]
    (tmp_path / "in").mkdir()
    listed = []
    for number, row in enumerate(rows):
        image = Image.open(shared_data / "image_caption" / row["image"]).convert("RGB")
        image.save(tmp_path / "in" / f"a{number:02d}.png")
        image.resize((image.width * 2 // 3, image.height * 2 // 3)).save(
            tmp_path / "in" / f"b{number:02d}.jpg", quality=40
        )
        listed += [{"image": f"a{number:02d}.png", "caption": "one"}]
    listed += [{"image": f"b{number:02d}.jpg", "caption": "two"} for number in range(len(rows))]
    write_jsonl(tmp_path / "in" / "captions.jsonl", listed)
    options = {"prepare": {"heldout_share": 0, "dedup": {"near": True}}}
    run("image_caption", tmp_path / "in", tmp_path / "out", options)
    pairs = {line["key"]: line["duplicate_of"] for line in removed(tmp_path / "out")}
    print(f"recall {len(pairs)} of {len(rows)}")
    assert all(key[0] == "b" and key[1:] == of[1:] for key, of in pairs.items())
    assert len(pairs) >= len(rows) - 1
