"""The data's way: what is planned is what is decoded, whatever is restored, whoever decodes and whatever breaks."""

import json
import os
import re
from itertools import islice

import numpy as np
import pytest
import torch

from mmoe.data.config import DataConfig, SourceConfig
from mmoe.data.load.decode import SampleLoader
from mmoe.data.load.heldout import HeldoutBatches
from mmoe.data.load.quarantine import FEW
from mmoe.data.plan.planner import DocumentRef
from mmoe.data.plan.prepared import PreparedSources
from mmoe.errors import ConfigError, DataError
from mmoe.schema.batch import IGNORE
from mmoe.schema.modality import Modality
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.text import TextTokenizer
from mmoe.tokenizers.vocabulary import Structure
from tests.data.streams import LENGTH, WEIGHTS, equal, rows, setup, stream, take, write_folders
from tests.data.synthetic import MAKERS, audio_sample, fit_codec, text_sample, write_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("sources"))


def test_planned_counts_are_those_of_the_batches(folders):
    for batch_list, counts, _ in take(stream(folders), 6):
        labels = torch.cat([b.labels.flatten() for b in batch_list]).numpy()
        kinds = stream(folders).collator.vocabulary.modality_of(labels[labels != IGNORE])
        assert np.bincount(kinds, minlength=len(Modality)).tolist() == counts.labels.tolist()
        assert sum(int(b.valid.sum()) for b in batch_list) == counts.positions
        assert sum(int(b.action_mask.sum()) for b in batch_list) == counts.action_elements
        assert sum(len(b.pairs.group) for b in batch_list) == counts.pairs
        assert sum(int((b.values[Modality.VISION].index >= 0).sum()) for b in batch_list) == counts.patches


def test_a_restored_stream_continues_bit_for_bit_also_inside_a_window(folders):
    whole = take(stream(folders), 12)
    for cut in (1, 5, 8):
        resumed = stream(folders)
        resumed.restore(whole[cut - 1][2])
        for (left, _, a), (right, _, b) in zip(whole[cut:], take(resumed, 12 - cut), strict=True):
            assert a == b and all(equal(x, y) for x, y in zip(left, right, strict=True))


def test_ranks_and_workers_change_no_global_batch_also_after_a_resume_inside_a_window(folders):
    """One stream lives through 1, 2, 3 and 4 replicas with 0, 1 and 3 workers; every step is that of one process."""
    choices = {"sequences": 12, "group": 1, "micro": 1}
    whole = take(stream(folders, **choices), 8)
    state, step = None, 0
    for replicas, workers in ((1, 0), (2, 1), (3, 3), (4, 0)):
        parts = []
        for replica in range(replicas):
            part = stream(folders, replica=replica, replicas=replicas, workers=workers, **choices)
            if state is not None:
                part.restore(state)
            parts.append(take(part, 2))
        for offset in range(2):
            found = set.union(*(rows(part[offset][0]) for part in parts))
            assert len(found) == 12 and found == rows(whole[step + offset][0])
            assert all((p[offset][1].columns == whole[step + offset][1].columns).all() for p in parts)
        step += 2
        state = parts[-1][1][2]
        assert state["plan"] == whole[step - 1][2]["plan"]
    assert whole[1][2]["plan"]["next_sequence"] > 0  # it was resumed inside a window


def test_contrastive_groups_stay_whole_on_any_number_of_replicas(folders):
    whole = take(stream(folders, share=1.0, sequences=8, group=2), 3)
    parts = [take(stream(folders, share=1.0, sequences=8, group=2, replica=r, replicas=2), 3) for r in range(2)]
    for step in range(3):
        assert set.union(*(rows(part[step][0]) for part in parts)) == rows(whole[step][0])
        groups = [{int(g) for b in part[step][0] for g in b.pairs.group} for part in parts]
        assert groups[0] and not groups[0] & groups[1]


@pytest.mark.parametrize(("group", "within"), [(4, 1), (8, 2)], ids=["gathered", "cached"])
def test_wider_contrastive_groups_are_whole_in_a_micro_step_or_in_a_step(folders, group, within):
    """Two replicas in micro-batches of 2: a group of 4 is in one micro-step of both, one of 8 in the whole step."""
    choices = {"share": 1.0, "sequences": 8, "group": group, "micro": 2}
    whole = take(stream(folders, **choices), 3)
    parts = [take(stream(folders, replica=r, replicas=2, **choices), 3) for r in range(2)]
    for step in range(3):
        assert set.union(*(rows(part[step][0]) for part in parts)) == rows(whole[step][0])
        found = []
        for first in range(0, 2, within):
            batches = [b for part in parts for b in part[step][0][first : first + within]]
            found.append({int(g) for b in batches for g in b.pairs.group})
        assert all(len(groups) == 1 for groups in found) and len(set.union(*found)) == 8 // group


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_replica_is_told_the_balance_of_what_all_are_given(folders, replicas):
    parts = [stream(folders, replica=r, replicas=replicas, sequences=8).steps() for r in range(replicas)]
    found = set()
    for steps in islice(zip(*parts, strict=True), 6):
        patches = np.array(
            [sum(int((b.values[Modality.VISION].index >= 0).sum()) for b in step.batches) for step in steps]
        )
        (told,) = {step.balance for step in steps}
        assert told[0] >= 1 and told[1] == pytest.approx(patches.max() / patches.mean())
        found.add(told)
    assert (found == {(1.0, 1.0)}) == (replicas == 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(folders, workers):
    for (left, _, a), (right, _, b) in zip(take(stream(folders), 5), take(stream(folders, workers=workers), 5)):
        assert a == b and all(equal(x, y) for x, y in zip(left, right, strict=True))


def test_a_batch_that_cannot_be_dealt_is_refused(folders):
    with pytest.raises(ConfigError, match="8 sequences cannot be dealt to 3 data replicas"):
        stream(folders, sequences=8, replicas=3)


def test_heldout_batches_hold_every_held_out_document(folders):
    config, sources, tokenizers = setup(folders)
    found = HeldoutBatches(config, sources, tokenizers, seed=0, micro_sequences=2, label_weights=WEIGHTS, isolated=True)
    origins = {d[:3] for batch in found for documents in batch.documents for d in documents}
    assert len(origins) == 8 * len(MAKERS)


def test_another_text_tokenizer_is_refused_by_name(folders):
    _, sources, tokenizers = setup(folders, names=("text",))
    tokenizers.text = TextTokenizer.train(["some other text"] * 50, 300)
    with pytest.raises(DataError, match="tokenizer"):
        sources.check(tokenizers)


def test_a_truncated_tar_is_one_sentence_with_file_and_remedy(folders, tmp_path):
    write_source(tmp_path / "audio", {"train": [MAKERS["audio"](np.random.default_rng(0), "a-0")]})
    config = DataConfig(
        sources={"audio": SourceConfig(kind="text", shards=str(tmp_path / "audio"))}, sequence_length=LENGTH
    )
    sources = PreparedSources(config)
    tokenizers = TokenizersConfig(audio=fit_codec(folders / "codec.safetensors")).build(sources.manifests)
    tar = tmp_path / "audio" / "train" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(DataError, match="shard-000000.tar"):
        SampleLoader(sources.files("train"), tokenizers, "pyav")(DocumentRef(0, 0, 0, 0, 0, 1, False, True))


# what breaks on the way


@pytest.fixture
def damaged(folders, tmp_path):
    """The sources with the audio clips of three samples overwritten, as a disk does it."""
    rng = np.random.default_rng(2)
    write_source(tmp_path / "audio", {"train": [audio_sample(rng, f"audio-{i}") for i in range(30)]})
    write_source(tmp_path / "text", {"train": [text_sample(rng, f"t{i}") for i in range(30)]})
    fit_codec(tmp_path / "codec.safetensors")
    whole = take(stream(tmp_path, names=("text", "audio")), 6)
    _, sources, tokenizers = setup(tmp_path, names=("text", "audio"))
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
    bad = []
    for shard, row in ((0, 1), (1, 2), (3, 0)):
        index = decoder.index(1, shard)
        tar = tmp_path / "audio" / "train" / f"shard-{shard:06d}.tar"
        content = bytearray(tar.read_bytes())
        _name, offset, size = index.row_member(row, 0)
        content[offset : offset + size] = bytes(size)
        tar.write_bytes(content)
        bad.append(index.keys[row])
    return tmp_path, whole, bad


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_becomes_padding_and_everything_else_stays_as_it_was(damaged, workers):
    root, whole, bad = damaged
    data = stream(
        root, names=("text", "audio"), workers=workers, error_budget=1.0, quarantine=root / "run/quarantine.jsonl"
    )
    lost = []
    for (left, a, before), (right, b, after) in zip(whole, take(data, 6), strict=True):
        assert (a.columns == b.columns).all() and before["plan"] == after["plan"]
        for x, y in zip(left, right, strict=True):
            lost += [item.key for item in y.quarantined]
            gone = x.valid & ~y.valid
            assert int(gone.sum()) == sum(item.positions for item in y.quarantined)
            assert not (y.valid & ~x.valid).any()
            for name in ("token_ids", "labels", "position", "slice", "offset_ns", "loss_weight", "source"):
                assert torch.equal(getattr(x, name)[y.valid], getattr(y, name)[y.valid]), name
            assert (y.labels[gone] == IGNORE).all() and (y.token_ids[gone] == Structure.PAD).all()
            kept = [d for sequence in y.documents for d in sequence]
            assert set(kept) <= {d for sequence in x.documents for d in sequence}
    assert set(lost) <= set(bad) and len(lost) > 0
    lines = [json.loads(line) for line in (root / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == lost and all(line["source"] == "audio" for line in lines)
    assert "its checksum differs" in lines[0]["reason"] and lines[0]["shard"].endswith(".tar")
    assert data.state()["quarantine"]["lost"] == {"audio": len(lost)}


def test_the_count_of_lost_samples_survives_a_resume(damaged):
    root, _, _ = damaged
    whole, again = (stream(root, names=("text", "audio"), error_budget=1.0) for _ in range(2))
    steps = take(whole, 6)
    again.restore(steps[2][2])
    assert take(again, 3)[-1][2] == steps[-1][2]


def test_too_many_bad_samples_stop_the_run_with_a_summary(damaged):
    root, _, _ = damaged
    for tar in (root / "audio" / "train").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[1000:] = os.urandom(len(content) - 1000)
        tar.write_bytes(content)
    data = stream(root, names=("text", "audio"), quarantine=root / "q.jsonl")
    with pytest.raises(
        DataError, match=r"source audio: \d+ of \d+ documents could not be decoded.*error_budget"
    ) as error:
        take(data, 60)
    assert int(re.search(r"audio: (\d+) of", str(error.value))[1]) > FEW and "q.jsonl" in str(error.value)


def test_held_out_samples_that_cannot_be_decoded_are_an_error(damaged):
    root, _, _ = damaged
    config, sources, tokenizers = setup(root, names=("text", "audio"))
    with pytest.raises(DataError, match="its checksum differs"):
        choices = {"seed": 0, "micro_sequences": 1, "label_weights": WEIGHTS, "isolated": False, "split": "train"}
        list(HeldoutBatches(config, sources, tokenizers, **choices))
