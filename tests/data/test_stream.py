"""The data's way: what is planned is what is decoded, whatever is restored and whoever decodes."""

import numpy as np
import pytest
import torch

from mmoe.data.batch import IGNORE, PackedBatch
from mmoe.data.decode import Ablation, Decoder
from mmoe.data.measure import measure_index
from mmoe.data.plan import Counts, DocumentRef, Planner, PlanSettings
from mmoe.data.sample import Modality
from mmoe.data.stream import DataConfig, SourceConfig, Sources, Stream, heldout_batches
from mmoe.errors import ConfigError, DataError
from mmoe.tokenizers.actions import ActionConfig
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.text import TextTokenizer
from mmoe.tokenizers.vision import VisionConfig
from mmoe.tokenizers.vocabulary import Structure
from tests.data.synthetic import MAKERS, fit_codec, text_sample, write_source

LENGTH = 160
WEIGHTS = np.ones(len(Modality), np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for number, (name, make) in enumerate(MAKERS.items()):
        rng = np.random.default_rng(number)
        train = [make(rng, f"{name}-{i}") for i in range(30)]
        heldout = [make(rng, f"{name}-h{i}") for i in range(8)]
        if name == "text":
            train.append(text_sample(rng, "long", 200, 220))
        write_source(root / name, {"train": train, "heldout": heldout})
    fit_codec(root / "codec.safetensors")
    return root


def setup(folders, *, discrete=False, workers=0, share=0.5, names=tuple(MAKERS)):
    config = DataConfig(
        sources={name: SourceConfig(kind="text", shards=str(folders / name)) for name in names},
        sequence_length=LENGTH,
        window_documents=40,
        isolated_pair_share=share,
        workers=workers,
    )
    sources = Sources(config)
    tokenizers = TokenizersConfig(
        vision=VisionConfig(patch=8, max_patches=12),
        audio=fit_codec(folders / "codec.safetensors"),
        action=ActionConfig(mode="discrete", chunk=4, bins=16) if discrete else ActionConfig(chunk=4),
    ).build(sources.manifests)
    return config, sources, tokenizers


def stream(folders, **choices) -> Stream:
    config, sources, tokenizers = setup(folders, **choices)
    return Stream(
        config,
        sources,
        tokenizers,
        seed=3,
        micro_sequences=2,
        accumulation=2,
        group_sequences=2,
        label_weights=WEIGHTS,
    )


def take(stream: Stream, steps: int):
    out = []
    for _, data in zip(range(steps), stream.steps()):
        out.append((list(data.batches), data.counts, data.state))
    return out


def equal(a: PackedBatch, b: PackedBatch) -> bool:
    names = [n for n in a.__dataclass_fields__ if n not in ("values", "pairs", "documents")]
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.documents == b.documents
    same &= all(torch.equal(getattr(a.pairs, n), getattr(b.pairs, n)) for n in ("span", "modality", "group"))
    return same and all(
        torch.equal(a.values[k].values, b.values[k].values) and torch.equal(a.values[k].index, b.values[k].index)
        for k in a.values
    )


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", list(MAKERS))
def test_measures_are_those_of_the_layout(folders, name, isolated, discrete):
    _, sources, tokenizers = setup(folders, discrete=discrete, names=(name,))
    decoder = Decoder(sources.files("train"), tokenizers, "pyav")
    for shard in range(len(sources.files("train")[0].tars)):
        index = decoder.index(0, shard)
        measures = measure_index(index, tokenizers, name)
        for row in range(len(index)):
            units = max(1, int(measures.slices[row])) if not measures.text_only[row] else len(index.row_text(row))
            split = isolated and measures.pairs[row] > 0
            documents = decoder(DocumentRef(0, shard, row, 0, 0, units, bool(split), True))
            labels = np.concatenate([d.labels for d in documents])
            kinds = tokenizers.vocabulary.modality_of(labels[labels != IGNORE])
            expected = (measures.isolated_labels if split else measures.labels)[row]
            assert sum(map(len, documents)) == (measures.isolated if split else measures.length)[row]
            assert np.bincount(kinds, minlength=len(Modality)).tolist() == expected.tolist()
            assert sum((d.modality == Modality.VISION).sum() for d in documents) == measures.patches[row]
            assert sum(d.action_mask.sum() for d in documents) == measures.action_elements[row]
            if split:
                assert len(documents) - 1 == measures.pairs[row]


def test_planned_counts_are_those_of_the_batches(folders):
    for batches, counts, _ in take(stream(folders), 6):
        labels = torch.cat([b.labels.flatten() for b in batches]).numpy()
        kinds = stream(folders).collator.vocabulary.modality_of(labels[labels != IGNORE])
        assert np.bincount(kinds, minlength=len(Modality)).tolist() == counts.labels.tolist()
        assert sum(int(b.valid.sum()) for b in batches) == counts.positions
        assert sum(int(b.action_mask.sum()) for b in batches) == counts.action_elements
        assert sum(len(b.pairs.group) for b in batches) == counts.pairs
        assert sum(int((b.values[Modality.VISION].index >= 0).sum()) for b in batches) == counts.patches


def test_a_restored_stream_continues_bit_for_bit_also_inside_a_window(folders):
    whole = take(stream(folders), 12)
    for cut in (1, 5, 8):
        resumed = stream(folders)
        resumed.restore(whole[cut - 1][2])
        for (left, _, a), (right, _, b) in zip(whole[cut:], take(resumed, 12 - cut), strict=True):
            assert a == b and all(equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(folders, workers):
    for (left, _, a), (right, _, b) in zip(take(stream(folders), 5), take(stream(folders, workers=workers), 5)):
        assert a == b and all(equal(x, y) for x, y in zip(left, right, strict=True))


def test_every_document_comes_once_an_epoch_and_nothing_is_split_that_fits(folders):
    config, sources, tokenizers = setup(folders)
    settings = PlanSettings(3, LENGTH, LENGTH, 40, 0.5)
    planner = Planner(sources.planned("train", 3), [0.25] * 4, tokenizers, settings)
    seen = {(s.number, e): [] for s in planner.sources for e in range(2)}
    for _ in range(200):
        for ref in planner.next_sequence().documents:
            if ref.part == 0:
                rows = seen[ref.source, 0]
                rows = rows if len(rows) < planner.sources[ref.source].rows else seen[ref.source, 1]
                rows.append((ref.shard, ref.row))
    assert planner.counts_lost["text", "cut at a text token"] > 0
    drawn = planner.state.drawn
    for source in planner.sources:
        assert drawn[source.number] > 0


@pytest.mark.parametrize("name", list(MAKERS))
def test_once_plans_every_part_of_every_document_exactly_once(folders, name):
    _, sources, tokenizers = setup(folders, names=(name,))
    settings = PlanSettings(3, LENGTH, LENGTH, 1, 1.0)
    planner = Planner(sources.planned("train", 3), [1.0], tokenizers, settings)
    refs = [ref for sequence in planner.once() for ref in sequence.documents]
    units: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for ref in refs:
        units.setdefault((ref.shard, ref.row), []).append((ref.first, ref.last))
    assert len(units) == planner.sources[0].rows
    for parts in units.values():
        parts.sort()
        assert parts[0][0] == 0 and all(a[1] == b[0] for a, b in zip(parts, parts[1:]))
    assert all(s.counts.positions <= LENGTH for s in planner.once())


def test_realised_shares_follow_the_configured_weights(folders):
    config, sources, tokenizers = setup(folders)
    shares = [0.5, 0.3, 0.15, 0.05]
    planner = Planner(sources.planned("train", 3), shares, tokenizers, PlanSettings(3, LENGTH, LENGTH, 200, 0.5))
    while planner.state.window < 5:
        planner.next_sequence()
    served = np.array(planner.state.served)
    assert np.abs(served / served.sum() - shares).max() < 0.01


def test_labels_are_shifted_inside_a_document_and_cross_no_border(folders):
    for batches, _, _ in take(stream(folders), 4):
        for batch in batches:
            ids, labels, document = batch.token_ids, batch.labels, batch.document
            at = (labels != IGNORE) & (batch.modality != Modality.ACTION)
            b, i = at.nonzero(as_tuple=True)
            assert torch.equal(labels[b, i], ids[b, i + 1])
            assert torch.equal(document[b, i], document[b, i + 1]) and (document[b, i] >= 0).all()
            assert (batch.loss_weight[labels == IGNORE] == 0).all()


def test_no_label_stands_inside_a_slices_pictures_and_vision_comes_first(folders):
    for batches, _, _ in take(stream(folders, names=("clip",)), 4):
        for batch in batches:
            for b in range(batch.shape[0]):
                for key in {(int(d), int(s)) for d, s in zip(batch.document[b], batch.slice[b]) if s >= 0}:
                    inside = ((batch.document[b] == key[0]) & (batch.slice[b] == key[1])).nonzero().flatten()
                    kinds = batch.modality[b, inside]
                    vision = inside[kinds == Modality.VISION]
                    assert (batch.labels[b, vision[0] : vision[-1] + 1] == IGNORE).all()
                    others = inside[(kinds != Modality.VISION) & (kinds != Modality.STRUCTURE)]
                    assert len(others) == 0 or others.min() > vision.max()


def test_positions_of_text_are_ordinary_and_cameras_share_their_time(folders):
    for batches, _, _ in take(stream(folders, share=0.0), 4):
        for batch in batches:
            for b in range(batch.shape[0]):
                for d in range(int(batch.document[b].max()) + 1):
                    here = batch.document[b] == d
                    place, kind = batch.position[b, here], batch.modality[b, here]
                    if not (kind == Modality.VISION).any():
                        assert torch.equal(place, torch.arange(len(place))[:, None].expand(-1, 3).int())
                    for number in batch.slice[b, here].unique():
                        at = (batch.slice[b, here] == number) & (kind == Modality.VISION) & (number >= 0)
                        assert len(place[at, 0].unique()) <= 1


def test_isolated_pairs_link_two_documents_of_one_sequence(folders):
    seen = 0
    for batches, _, _ in take(stream(folders, share=1.0), 6):
        for batch in batches:
            document, modality = batch.document.flatten(), batch.modality.flatten()
            for span, kinds in zip(batch.pairs.span, batch.pairs.modality):
                (a, b), (c, d) = span.tolist()
                assert a // LENGTH == c // LENGTH and document[a] != document[c]
                assert len(document[a:b].unique()) == len(document[c:d].unique()) == 1
                assert kinds[1] == Modality.TEXT and (modality[c:d] == Modality.TEXT).all()
                assert kinds[0] != Modality.TEXT and modality[a] == modality[b - 1] == kinds[0]
                seen += 1
    assert seen > 10


def test_cu_seqlens_name_every_border_and_padding_tail(folders):
    for batches, _, _ in take(stream(folders), 3):
        for batch in batches:
            flat = batch.document + 1000 * torch.arange(batch.shape[0])[:, None]
            changes = (flat.flatten().diff() != 0).nonzero().flatten() + 1
            assert batch.cu_seqlens.tolist() == [0, *changes.tolist(), batch.document.numel()]
            assert (batch.token_ids[~batch.valid] == Structure.PAD).all()


def test_blank_and_shuffled_pictures_change_nothing_but_the_patches(folders):
    config, sources, tokenizers = setup(folders, names=("clip",))
    files = sources.files("heldout")
    index = Decoder(files, tokenizers, "pyav").index(0, 0)
    donors = {(0, 0, row): (0, (row + 1) % len(index)) for row in range(len(index))}
    units = int(index.row_segments(0)["slice"].max()) + 1
    ref = DocumentRef(0, 0, 0, 0, 0, units, False, True)
    plain, blank, mixed = (
        Decoder(files, tokenizers, "pyav", ablation)(ref)[0]
        for ablation in (
            None,
            Ablation("blank", Modality.VISION, {}),
            Ablation("shuffle", Modality.VISION, donors),
        )
    )
    assert np.array_equal(plain.token_ids, blank.token_ids) and np.array_equal(plain.token_ids, mixed.token_ids)
    size = tokenizers.vision.patch_dim
    vectors = [d.values[Modality.VISION][0][:, :size] for d in (plain, blank, mixed)]
    assert (vectors[1] == 0).all() and vectors[0].shape == vectors[2].shape
    assert not np.allclose(vectors[0], vectors[2])


def test_heldout_batches_hold_every_held_out_document(folders):
    config, sources, tokenizers = setup(folders)
    batches = heldout_batches(
        config, sources, tokenizers, seed=0, micro_sequences=2, label_weights=WEIGHTS, isolated=True
    )
    origins = {d[:3] for batch in batches for documents in batch.documents for d in documents}
    assert len(origins) == 8 * len(MAKERS)


def test_a_slice_longer_than_a_sequence_stops_at_start_and_names_the_knobs(folders):
    config, sources, tokenizers = setup(folders, names=("clip",))
    settings = PlanSettings(3, 24, 24, 4, 0.5)
    with pytest.raises(ConfigError, match="a slice is never split: raise them, or lower tokenizers.vision.max_patches"):
        Planner(sources.planned("train", 3), [1.0], tokenizers, settings)


def test_another_text_tokenizer_is_refused_by_name(folders):
    config, sources, tokenizers = setup(folders, names=("text",))
    tokenizers.text = TextTokenizer.train(["some other text"] * 50, 300)
    with pytest.raises(DataError, match="tokenizer"):
        sources.check(tokenizers)


def test_a_truncated_tar_is_one_sentence_with_file_and_remedy(folders, tmp_path):
    rng = np.random.default_rng(0)
    write_source(tmp_path / "audio", {"train": [MAKERS["audio"](rng, "a-0")]})
    _, sources, tokenizers = setup_at(tmp_path, folders)
    tar = tmp_path / "audio" / "train" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(DataError, match="shard-000000.tar"):
        Decoder(sources.files("train"), tokenizers, "pyav")(DocumentRef(0, 0, 0, 0, 0, 1, False, True))


def setup_at(root, folders):
    config = DataConfig(
        sources={"audio": SourceConfig(kind="text", shards=str(root / "audio"))}, sequence_length=LENGTH
    )
    sources = Sources(config)
    audio = fit_codec(folders / "codec.safetensors")
    return config, sources, TokenizersConfig(audio=audio).build(sources.manifests)


def test_counts_add():
    one = Counts(1, np.arange(7), 2, 3, 4)
    assert (one + one).positions == 2 and (one + Counts.zero()).labels.tolist() == list(range(7))
