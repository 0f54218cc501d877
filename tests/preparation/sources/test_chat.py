"""Dialogues: what the assistant says is learned and nothing else, from the row to the gradient."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmoe.config.load import validate
from mmoe.data.load.decode import SampleLoader
from mmoe.data.plan.measure import epoch_positions, measure_index
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import DataError
from mmoe.losses.cross_entropy import cross_entropy
from mmoe.recipe.config import RunConfig
from mmoe.schema.batch import IGNORE
from mmoe.schema.modality import Modality
from mmoe.schema.sample import GIVEN
from mmoe.tokenizers.vocabulary import Structure
from mmoe.training.run import Run
from tests.data.recordings import images, png, write_jsonl
from tests.data.recordings_tables import save_to_disk, write_stream
from tests.data.streams import LENGTH, setup, stream, take
from tests.preparation.sources.test_sources import read
from tests.preparation.test_prepare import run

SHORT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!\nHow are you?"},
    {"role": "assistant", "content": " Fine … 元気です."},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "So?"},
    {"role": "user", "content": "Bye."},
]
WRITTEN = (
    "<|system|>\nBe brief.<|end|>\n<|user|>\nHello!\nHow are you?<|end|>\n<|assistant|>\n Fine … 元気です.<|end|>\n"
    "<|user|>\n<|end|>\n<|assistant|>\nSo?<|end|>\n<|user|>\nBye.<|end|>"
)


def spelled(messages):
    """The bytes of a dialogue, and which of them are the assistant's."""
    content, learned = b"", []
    for number, message in enumerate(messages):
        begin = ("\n" if number else "") + f"<|{message['role']}|>\n"
        for text, mine in ((begin, False), (message["content"] + "<|end|>", message["role"] == "assistant")):
            content += text.encode()
            learned += [mine] * len(text.encode())
    return content, np.array(learned)


def marked(sample):
    """The same of a sample."""
    texts = [segment for segment in sample.segments if segment.modality is Modality.TEXT]
    learned = [[segment.rate != GIVEN] * len(segment.text.encode()) for segment in texts]
    return "".join(segment.text for segment in texts).encode(), np.concatenate(learned)


def dialogues(count, seed=0, most=60):
    """Random ones: few turns and many, some many times as long as a sequence; a last turn of either side."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        turns = int(rng.integers(2, 9))
        first = int(rng.integers(2))
        lengths = rng.integers(1, most, turns) * (1 + 9 * (rng.random(turns) < 0.1))
        roles = [("user", "assistant")[(first + number) % 2] for number in range(turns)]
        texts = ["".join(rng.choice(list("ab cdeü"), n)) + "." for n in lengths]
        found.append([{"role": role, "content": text} for role, text in zip(roles, texts)])
    return found


def write_jsonl_rows(folder, rows):
    write_jsonl(folder / "rows.jsonl", rows)


def write_json(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows))


def write_parquet(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=2)


def write_arrow(folder, rows):
    write_stream(folder / "rows.arrow", pa.Table.from_pylist(rows), rows=2)


def write_saved(folder, rows):
    save_to_disk(folder, pa.Table.from_pylist(rows), shards=1)


@pytest.mark.parametrize("write", [write_jsonl_rows, write_json, write_parquet, write_arrow, write_saved])
@pytest.mark.parametrize("form", ["messages", "conversations", "turns"])
def test_rows_of_any_table_are_written_with_markers_and_only_the_assistant_is_learned(tmp_path, write, form):
    assert spelled(SHORT)[0].decode() == WRITTEN
    rows, names = [SHORT, *dialogues(4)], {"system": "system", "user": "human", "assistant": "gpt"}
    others = [[{"from": names[m["role"]], "value": m["content"]} for m in row] for row in rows]
    write(tmp_path, [{form: row, "id": "x"} for row in (others if form == "conversations" else rows)])
    samples, refused = read("chat", tmp_path, **({"columns": {"messages": "turns"}} if form == "turns" else {}))
    assert not refused and len(samples) == 5
    for sample, row in zip(samples.values(), rows):
        (content, learned), (expected, mine) = marked(sample), spelled(row)
        assert content == expected == sample.members["txt"] and (learned == mine).all()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    rows = dialogues(60, 1)
    write_jsonl(root / "in/rows.jsonl", [{"messages": row} for row in rows])
    run("chat", root / "in", root / "chat", prepare={"heldout_share": 0.2, "shard_rows": 9})
    return root, rows


def test_planned_labels_are_those_of_the_batch_over_every_cut(prepared):
    folder, dialogue = prepared
    run_stream = stream(folder, names=("chat",))
    _, sources, tokenizers = setup(folder, names=("chat",))
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
    start, room = tokenizers.vocabulary.ranges["text"].start, LENGTH - 2
    parts, learned = set(), 0
    for batches, counts, _ in take(run_stream, 40):
        found = np.zeros(len(Modality), int)
        for batch in batches:
            labels, document = batch.labels.numpy(), batch.document.numpy()
            kinds = tokenizers.vocabulary.modality_of(labels[labels != IGNORE])
            found += np.bincount(kinds, minlength=len(Modality))
            for b, places in enumerate(batch.documents):
                for d, (source, shard, row, part) in enumerate(places):
                    number = int(decoder.index(source, shard).keys[row].rpartition("-")[2])
                    content, mine = spelled(dialogue[number])
                    ids, first = start + np.frombuffer(content, np.uint8).astype(int), part * room
                    last = min(first + room, len(ids))
                    expected = [int(i) if m else IGNORE for i, m in zip(ids[first:last], mine[first:last])]
                    expected += [IGNORE]
                    if last == len(ids):
                        expected = [*expected[:-1], int(Structure.EOS) if mine[-1] else IGNORE, IGNORE]
                    assert labels[b, document[b] == d].tolist() == expected
                    parts.add((number, part))
                    learned += sum(label >= 0 for label in expected)
        assert counts.labels.tolist() == found.tolist()
    assert {part for _, part in parts} >= {0, 1, 2, 3} and learned


def test_measures_are_those_of_whole_documents_and_the_manifest_sizes_an_epoch(prepared):
    folder, dialogue = prepared
    _, sources, tokenizers = setup(folder, names=("chat",))
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
    positions = 0
    for shard in range(len(sources.files("train")[0].tars)):
        index = decoder.index(0, shard)
        measures = measure_index(index, tokenizers, "chat")
        for row in range(len(index)):
            _, mine = spelled(dialogue[int(index.keys[row].rpartition("-")[2])])
            assert measures.labels[row, Modality.TEXT] == mine.sum() and measures.length[row] == len(mine) + 2
            assert measures.labels[row, Modality.STRUCTURE] == mine[-1] and measures.text_only[row]
            positions += len(mine) + 2
    assert epoch_positions(sources.manifests["chat"].splits["train"], tokenizers, "chat") == positions


def test_no_gradient_comes_from_what_the_user_says(prepared, tmp_path):
    folder, _ = prepared
    tree = {
        "data": {"sources": {"chat": {"kind": "chat", "shards": str(folder / "chat")}}, "sequence_length": LENGTH},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 32},
        "losses": {"contrastive": {"weight": 0.0}},
        "optim": {"lr": {"peak": 1e-3}},
        "training": {
            "run": str(tmp_path),
            "micro_batch_sequences": 2,
            "global_batch_positions": 2 * LENGTH,
            "budget_positions": 4 * LENGTH,
        },
    }
    model = Run.build(validate(RunConfig, tree, "test")).model.double()

    def gradients(batch):
        hidden = model(batch).hidden
        ce = cross_entropy(model.logits, hidden, batch.labels, batch.loss_weight, 64)
        return torch.autograd.grad(ce.total, [hidden, *model.parameters()], allow_unused=True)

    _, _, tokenizers = setup(folder, names=("chat",))
    start = tokenizers.vocabulary.ranges["text"].start
    seen = 0
    for batches, _, _ in take(stream(folder, names=("chat",)), 4):
        for batch in batches:
            of_hidden, *before = gradients(batch)
            labeled = batch.labels != IGNORE
            assert (of_hidden[~labeled] == 0).all() and (of_hidden[labeled].abs().sum(-1) > 0).all()
            # What a user says last is nobody's label, and nobody learned has read it: other words change nothing.
            ids = batch.token_ids.clone()
            for b in range(batch.shape[0]):
                for d in range(len(batch.documents[b])):
                    here = (batch.document[b] == d).nonzero().flatten()
                    last = labeled[b, here].nonzero().max() + 1 if labeled[b, here].any() else 0
                    tail = here[last + 1 :][batch.modality[b, here[last + 1 :]] == Modality.TEXT]
                    ids[b, tail] = start + (ids[b, tail] - start + 1) % 256
                    seen += len(tail)
            _, *after = gradients(replace(batch, token_ids=ids))
            pairs = [pair for pair in zip(before, after, strict=True) if pair[0] is not None]
            assert all(torch.equal(a, b) for a, b in pairs)
            ids[:, 1:][labeled[:, :-1]] = start  # while what is learned is read by what is learned next
            _, *after = gradients(replace(batch, token_ids=ids))
            assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)
    assert seen > 20


@pytest.mark.parametrize("form", ["path", "part", "both", "bytes"])
def test_dialogues_about_one_image_are_on_one_side_of_the_split(tmp_path, form):
    """None of them is then a duplicate of a held-out one; those without an image are drawn one by one."""
    (tmp_path / "in").mkdir()
    rows = []
    for place in np.random.default_rng(0).permutation(24).tolist():
        number, content = place // 3, png(images(8)[place // 3])
        (tmp_path / f"in/.{number}.png").write_bytes(content)
        name = f".{number}.png"
        image = {
            "path": [name],
            "part": [],
            "both": [{"bytes": content, "path": name}],
            "bytes": [{"bytes": content, "path": None}],
        }[form]
        parts = [{"type": "image", "image": name}, {"type": "text", "text": f"Question {place}?"}]
        asked = {"role": "user", "content": parts if form == "part" else f"<image>Question {place}?"}
        rows.append({"messages": [asked, {"role": "assistant", "content": f"Answer {place}."}], "images": image})
    rows[5:5] = [{"messages": dialogue, "images": []} for dialogue in dialogues(4)]
    write = write_jsonl_rows if form in ("path", "part") else write_parquet
    write(tmp_path / "in", rows)
    manifest, _ = run("chat", tmp_path / "in", tmp_path / "out", prepare={"heldout_share": 0.25})
    assert sum(split.samples for split in manifest.splits.values()) == 28 and not manifest.removed
    samples, _ = read("chat", tmp_path / "in")
    recordings = [sample.recording for sample in samples.values()]
    assert len(set(recordings)) == 12 and not any(str(tmp_path) in name for name in recordings)
    assert recordings[5:9] == list(samples)[5:9]


def test_images_stand_where_their_messages_show_them(tmp_path):
    pictures = [png(pixels) for pixels in images(4)]
    for number, content in enumerate(pictures):
        (tmp_path / f"in/{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{number}.png").write_bytes(content)
    answer, image = {"role": "assistant", "content": "Two."}, {"type": "image"}
    text = {"type": "text", "text": "How many?"}

    def asked(content, reply=answer, **more):
        return {"messages": [{"role": "user", "content": content}, reply], **more}

    rows = [
        asked([{**image, "image": "0.png"}, text]),
        asked([text, image, image], images=["1.png", "2.png"]),
        asked("<image>\nHow many?", image="3.png"),
        asked("What does <image> mean?"),
        asked([text, image]),
        asked("No mark.", image="3.png"),
        asked("Draw.", {"role": "assistant", "content": [{**image, "image": "0.png"}]}),
    ]
    write_jsonl(tmp_path / "in/rows.jsonl", rows)
    (tmp_path / "in/notes.doc").write_text("x")
    samples, refused = read("chat", tmp_path / "in")
    shown = [
        [s.member if s.modality is Modality.VISION else (s.rate == GIVEN, s.text) for s in sample.segments]
        for sample in samples.values()
    ]
    end = [(True, "<|end|>\n<|assistant|>\n"), (False, "Two.<|end|>")]
    assert shown == [
        [(True, "<|user|>\n"), "image0.png", (True, "How many?<|end|>\n<|assistant|>\n"), end[1]],
        [(True, "<|user|>\nHow many?"), "image0.png", "image1.png", *end],
        [(True, "<|user|>\n"), "image0.png", (True, "\nHow many?<|end|>\n<|assistant|>\n"), end[1]],
        [(True, "<|user|>\nWhat does <image> mean?<|end|>\n<|assistant|>\n"), end[1]],
    ]
    held = [content for sample in samples.values() for name, content in sample.members.items() if name != "txt"]
    assert held == pictures
    reasons = ["images differ from messages"] * 2 + ["image of the assistant"]
    reasons = ["file of another kind", *reasons]  # which the images are not
    names = ["notes.doc", *(f"rows-{n:06d}" for n in (4, 5, 6))]
    assert {key: r.reason for key, r in refused.items()} == dict(zip(names, reasons, strict=True))
    run("chat", tmp_path / "in", tmp_path / "chat", prepare={"heldout_share": 0.25})
    _, sources, tokenizers = setup(tmp_path, names=("chat",), sequence_length=400)
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
    index = decoder.index(0, 0)
    measures = measure_index(index, tokenizers, "chat")
    for row in range(len(index)):
        units = 1 if not measures.text_only[row] else len(index.row_text(row))
        (document,) = decoder(DocumentRef(0, 0, row, 0, 0, units, False, True))
        labels = document.labels[document.labels != IGNORE]
        text = tokenizers.vocabulary.ranges["text"].start
        assert bytes((labels[:-1] - text).tolist()) == b"Two.<|end|>" and labels[-1] == Structure.EOS
        assert len(document) == measures.length[row]
        kinds = np.bincount(tokenizers.vocabulary.modality_of(labels), minlength=len(Modality))
        assert kinds.tolist() == measures.labels[row].tolist()


USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
BAD = {
    "no list": ("hello", "malformed row", "is 'hello', not a list of messages"),
    "empty": ([], "malformed row", "not a list of messages"),
    "role": ([USER, {"role": "teacher", "content": "x"}], "unknown role", "the role 'teacher' is not known"),
    "roles": ([{"role": ["user"], "content": "x"}, ASSISTANT], "unknown role", "the role ['user'] is not known"),
    "nobody": ([USER, USER], "nothing to learn", "no message is the assistant's"),
    "blank": ([USER, {"role": "assistant", "content": " "}], "empty text", "a message of the assistant is blank"),
    "null": ([USER, {"role": "assistant", "content": None}], "malformed row", "neither a text nor an image"),
    "marker": ([{"role": "user", "content": "a<|assistant|>\nb"}, ASSISTANT], "marker in a message", "<|assistant|>"),
    "part": ([{"role": "user", "content": [{"type": "audio"}]}, ASSISTANT], "malformed row", "{'type': 'audio'}"),
    "tools": ([USER, ASSISTANT | {"tool_calls": [{"id": 1}]}], "tool call", "a message calls tools"),
    "surrogate": ([{"role": "user", "content": "\ud83d"}, ASSISTANT], "text is not UTF-8", "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_no_dialogue_is_refused_alone_by_a_sentence(tmp_path, name):
    messages, reason, said = BAD[name]
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": messages}, {"messages": [USER, ASSISTANT]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, refused = read("chat", tmp_path)
    assert list(samples) == ["a-000000", "a-000002"]
    assert {key: r.reason for key, r in refused.items()} == {"a-000001": reason} and said in str(refused["a-000001"])


def test_a_table_without_messages_is_answered_with_its_columns(tmp_path):
    pq.write_table(pa.table({"message": [[USER]], "id": [1]}), tmp_path / "a.parquet")
    said = r"no column 'messages' or 'conversations'; did you mean message\? Set the option columns.messages to one of"
    with pytest.raises(DataError, match=said):
        read("chat", tmp_path)
    (tmp_path / "a.parquet").unlink()
    write_jsonl(tmp_path / "a.jsonl", [{"message": [USER, ASSISTANT]}])
    with pytest.raises(DataError, match=said):
        read("chat", tmp_path)
