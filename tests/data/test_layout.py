"""The layout of documents in a batch, and the closed forms that plan it."""

import numpy as np
import pytest
import torch

from mmoe.data.load.decode import SampleLoader
from mmoe.data.plan.measure import epoch_positions, measure_index
from mmoe.data.plan.planner import DocumentRef
from mmoe.evaluation.ablation import Ablation
from mmoe.schema.batch import IGNORE
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Structure
from tests.data.streams import LENGTH, setup, stream, take, write_folders
from tests.data.synthetic import MAKERS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", list(MAKERS))
def test_measures_are_those_of_the_layout(folders, name, isolated, discrete):
    _, sources, tokenizers = setup(folders, discrete=discrete, names=(name,))
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
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
            assert sum((d.modality == Modality.VISION).sum() for d in documents) == measures.count("patches")[row]
            assert sum(d.action_mask.sum() for d in documents) == measures.count("action_elements")[row]
            if split:
                assert len(documents) - 1 == measures.pairs[row]


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_manifest_alone_sizes_an_epoch(folders, name):
    _, sources, tokenizers = setup(folders, names=(name,))
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
    tables = [decoder.index(0, shard) for shard in range(len(sources.files("train")[0].tars))]
    exact = sum(int(measure_index(table, tokenizers, name).length.sum()) for table in tables)
    found = epoch_positions(sources.manifests[name].splits["train"], tokenizers, name)
    assert found == exact if name in ("text", "image") else found == pytest.approx(exact, rel=0.05)


def test_labels_are_shifted_inside_a_document_and_cross_no_border(folders):
    for batches, _, _ in take(stream(folders), 4):
        for batch in batches:
            ids, labels, document = batch.token_ids, batch.labels, batch.document
            at = (labels != IGNORE) & (batch.modality != Modality.ACTION)
            b, i = at.nonzero(as_tuple=True)
            assert torch.equal(labels[b, i], ids[b, i + 1])
            assert torch.equal(document[b, i], document[b, i + 1]) and (document[b, i] >= 0).all()
            assert (batch.loss_weight[labels == IGNORE] == 0).all()


def test_no_label_stands_inside_a_slices_images_and_vision_comes_first(folders):
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


def test_blank_and_shuffled_images_change_nothing_but_the_patches(folders):
    _config, sources, tokenizers = setup(folders, names=("clip",))
    files = sources.files("heldout")
    index = SampleLoader(files, tokenizers, "pyav").index(0, 0)
    donors = {(0, 0, row): (0, (row + 1) % len(index)) for row in range(len(index))}
    units = int(index.row_segments(0)["slice"].max()) + 1
    ref = DocumentRef(0, 0, 0, 0, 0, units, False, True)
    plain, blank, mixed = (
        SampleLoader(files, tokenizers, "pyav", ablation)(ref)[0]
        for ablation in (
            None,
            Ablation("blank", Modality.VISION, {}),
            Ablation("shuffle", Modality.VISION, donors),
        )
    )
    assert np.array_equal(plain.token_ids, blank.token_ids) and np.array_equal(plain.token_ids, mixed.token_ids)
    size = tokenizers.vision.patch_dim
    vectors = [np.concatenate(d.values[Modality.VISION][0])[:, :size] for d in (plain, blank, mixed)]
    assert (vectors[1] == 0).all() and vectors[0].shape == vectors[2].shape
    assert not np.allclose(vectors[0], vectors[2])
